"""One rule finds a network in a checkpoint: by its keys, at any depth, after any prefix; never the wrong one of two."""

import pytest
import torch
from torch import nn

from nat_models.checkpoints import CheckpointError, find_network, fit_state_dict, unwrap
from tests.checkpoints.conftest import random_state_dict, same_tensors, small_network

OURS, OTHER = random_state_dict("nat_models"), random_state_dict("nat_models")
TRANSFORMERS = random_state_dict("transformers")


def _prefixed(state_dict, prefix):
    return {f"{prefix}{key}": value for key, value in state_dict.items()}


def _is(found, state_dict) -> bool:
    return found.keys() == state_dict.keys() and all(found[key] is value for key, value in state_dict.items())


@pytest.mark.parametrize(
    "name",
    ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "averaged", "avg_model", "EMACallback", "swa", "ModelEma"],
)
@pytest.mark.parametrize("other", ["state_dict", "model", "net"])
def test_averaged_weights_win(name, other):
    assert _is(unwrap({other: OTHER, name: OURS}), OURS)
    assert _is(unwrap({name: OURS, other: OTHER}), OURS)
    assert _is(unwrap({other: OTHER, "callbacks": {name: {"state": OURS}}}), OURS)
    both = _prefixed(OTHER, f"{other}.") | _prefixed(OURS, f"{name}.module.")
    assert _is(unwrap({"state_dict": both}), OURS)


@pytest.mark.parametrize("name", ["schema", "semantic", "swap", "remaining", "emanate"])
def test_a_word_that_contains_a_word_for_averages_is_none(name):
    with pytest.raises(CheckpointError, match="networks that differ"):
        unwrap({"net": OTHER, name: OURS})


def test_the_first_of_timms_order_wins():
    order = ["state_dict_ema", "model_ema", "swa_model", "state_dict", "model"]
    for i, name in enumerate(order):
        others = dict.fromkeys(reversed(order[i + 1 :]), OTHER)
        assert _is(unwrap({"current_model_state": OTHER, **others, name: OURS}), OURS)


@pytest.mark.parametrize(
    ("checkpoint", "places"),
    [
        ({"teacher": OURS, "student": OTHER}, ["checkpoint['teacher']", "checkpoint['student']"]),
        (
            {"state_dict": _prefixed(OURS, "teacher.") | _prefixed(OTHER, "student.net.")},
            ["checkpoint['state_dict']['teacher.*']", "checkpoint['state_dict']['student.net.*']"],
        ),
        (_prefixed(OURS, "a.") | OTHER, ["checkpoint['a.*'] and", "and checkpoint;"]),
        ({"ema": {"fast": OURS, "slow": OTHER}}, ["checkpoint['ema']['fast']", "checkpoint['ema']['slow']"]),
        ([OURS, OTHER], ["checkpoint[0]", "checkpoint[1]"]),
        ({"a": OURS, "b": OURS | {"norm.weight": OURS["norm.weight"] + 1}}, ["checkpoint['a']", "checkpoint['b']"]),
        ({"a": OURS, "b": {k: v for k, v in OURS.items() if k != "norm.bias"}}, ["['a']", "['b']"]),
        ({"model": _prefixed(OURS, "a.") | _prefixed(TRANSFORMERS, "b.")}, ["['a.*']", "['b.*']"]),
    ],
)
def test_two_networks_that_differ_are_an_error_that_names_both(checkpoint, places):
    with pytest.raises(CheckpointError) as refused:
        unwrap(checkpoint)
    assert all(place in str(refused.value) for place in places)
    assert len(str(refused.value).splitlines()) == 2


def test_the_same_network_twice_is_one():
    copy = {key: value.clone() for key, value in OURS.items()}
    found = find_network({"state_dict": _prefixed(OURS, "model.") | _prefixed(copy, "metric.inner.net.")})
    assert _is(found.tensors, OURS) and found.place == "checkpoint['state_dict']['model.*']"
    assert _is(unwrap(OURS | _prefixed(copy, "metric.net.")), OURS)


def test_what_stands_beside_the_network_is_kept_apart():
    beside = {"loss.weight": torch.ones(3), "modelx.weight": torch.ones(3)}
    found = find_network({"state_dict": _prefixed(OURS, "model.") | beside})
    assert _is(found.tensors, OURS) and _is(found.beside, beside)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_averaged", torch.tensor(3)), ("updates", torch.tensor(3)), ("decay", torch.tensor(0.9)), ("epoch", 3)],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_counters_of_averages_are_no_weights(name, value, prefix):
    model = small_network()
    assert fit_state_dict(_prefixed(OURS, prefix) | {name: value}, model).keys() == OURS.keys()
    assert fit_state_dict(_prefixed(OURS | {name: value}, prefix), model).keys() == OURS.keys()


@pytest.mark.parametrize("name", ["logit_scale", "levels.0.blocks.0.attn.temperature"])
def test_a_learned_scalar_is_no_counter(name):
    with pytest.raises(CheckpointError, match=f"1 unexpected: {name}"):
        fit_state_dict(OURS | {name: torch.tensor(0.5)}, small_network())


def test_optimizers_that_name_their_parameters_are_no_networks():
    state = {key: {"step": torch.tensor(1.0), "exp_avg": value + 1} for key, value in OURS.items()}
    flat = {f"state.{key}.exp_avg": value + 1 for key, value in OURS.items()}
    assert _is(unwrap({"net": OURS, "optim": {"state": state}, "optim_flat": flat}), OURS)


def test_one_name_for_two_tensors_is_an_error():
    key = "levels.0.blocks.0.attn.qkv.weight"
    twice = OURS | {key.replace("0.blocks", "0._orig_mod.blocks"): OURS[key]}
    assert _is(unwrap(twice), OURS)
    twice[key.replace("0.blocks", "0._orig_mod.blocks")] = OURS[key] + 1
    with pytest.raises(CheckpointError, match=rf"two tensors that differ for {key}"):
        unwrap(twice)


def test_modules_are_searched_as_their_state_dicts():
    model = small_network()
    assert same_tensors(model, unwrap({"ema": nn.Sequential(model), "net": OTHER}))


def test_misfits_name_the_place_the_network_was_read_from():
    checkpoint = {"state_dict": _prefixed(OURS, "net.model.") | {"net.model.extra": torch.ones(1)}}
    with pytest.raises(CheckpointError, match=r"Read from checkpoint\['state_dict'\]\['net\.model\.\*'\]\.\n1 unex"):
        fit_state_dict(checkpoint, small_network())


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (
            {"state_dict": {"model.conv1.weight": torch.ones(1)}},
            r"such as 'model\.conv1\.weight'.*In checkpoint\['state",
        ),
        ({"encoder.model.layer1.weight": torch.ones(1)}, r"such as 'encoder\.model\.layer1"),
        ({"ema": {"shadow_params": [torch.ones(1)]}, "epoch": 3}, r"no tensors with names, but \['ema', 'epoch'\]"),
        ({}, r"no tensors with names, but \[\]"),
        (torch.ones(3), "no tensors with names, but Tensor"),
    ],
)
def test_no_network_at_all_says_what_was_found(checkpoint, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        unwrap(checkpoint)


def test_a_part_of_a_network_is_listed_as_incomplete():
    part = {key: v for key, v in TRANSFORMERS.items() if "embeddings" not in key}
    with pytest.raises(CheckpointError, match=r"6 missing: patch_embed\.proj\.0\.weight"):
        fit_state_dict({"state_dict": part}, small_network())


HEAD = {"fc.weight": torch.ones(7, 128), "fc.bias": torch.ones(7)}


def test_a_head_outside_the_network_is_not_replaced_without_a_word():
    checkpoint = _prefixed(random_state_dict("nat_models", num_classes=0), "backbone.") | HEAD
    with pytest.raises(CheckpointError, match=r"\['backbone\.\*'\] has no head, and fc\.weight beside it is"):
        fit_state_dict(checkpoint, small_network(num_classes=7), num_classes=1000)
    for num_classes in (0, 5):
        model = small_network(num_classes=num_classes)
        assert fit_state_dict(checkpoint, model, num_classes=1000).keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match=r"2 missing: head.*\n.*backbone without a head: num_classes=0 loads it"):
        fit_state_dict(checkpoint, small_network())
