"""A network is found whatever stands around it: random nesting, prefixes and wrappers."""

import random

import pytest
import torch

from nat_models.checkpoints import LAYOUTS, unwrap
from tests.checkpoints.conftest import random_state_dict

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

STATE_DICTS = {layout: random_state_dict(layout) for layout in LAYOUTS}
WRAPPERS = ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]

names = st.sampled_from(
    ["model", "net", "timm_model", "backbone", "encoder", "module", "student", "levels", "0", "norm"]
)


@settings(deadline=None, max_examples=100)
@given(
    layout=st.sampled_from(LAYOUTS),
    nesting=st.lists(st.one_of(names, st.just("checkpoint: 3"), st.integers()), max_size=4),
    prefix=st.lists(st.one_of(names, st.sampled_from(WRAPPERS)), max_size=4),
    in_list=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_nesting_and_any_prefix_gives_the_same_tensors(layout, nesting, prefix, in_list, seed):
    state_dict, rng = STATE_DICTS[layout], random.Random(seed)
    checkpoint = {}
    for key, value in state_dict.items():
        path = [*prefix, *key.split(".")]
        path.insert(rng.randrange(len(path)), rng.choice(WRAPPERS))
        checkpoint[".".join(path) if seed else ".".join([*prefix, key])] = value
    if set(prefix) - set(WRAPPERS):
        checkpoint |= {"loss.weight": torch.ones(3), "decoder.0.levels.0.weight": torch.ones(3)}
    items = list(checkpoint.items())
    rng.shuffle(items)
    checkpoint = dict(items)
    for name in nesting:
        inner = [checkpoint, "text"] if in_list else checkpoint
        checkpoint = {"epoch": 3, name: inner, "optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": 1}}}}
    found = unwrap(checkpoint)
    assert {key: id(value) for key, value in found.items()} == {key: id(v) for key, v in state_dict.items()}
