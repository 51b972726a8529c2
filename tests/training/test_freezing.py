"""Promises of what is not trained."""

import re

import pytest
import timm
import torch
from safetensors.torch import load_file

from nat_models.errors import UserError
from nat_models.training.freezing import freeze, set_training
from tests.training.conftest import TINY, fit, make_settings


def make_network():
    return timm.create_model("nat_mini", **TINY["model_kwargs"], num_classes=3, drop_path_rate=0.5)


@pytest.mark.parametrize(
    ("what", "trained"),
    [
        ("stem", ("levels.0", "levels.1", "levels.2", "levels.3", "norm", "head")),
        ("stem..level2", ("levels.3", "norm", "head")),
        ("level0..level1", ("patch_embed", "levels.2", "levels.3", "norm", "head")),
        ("level3", ("patch_embed", "levels.0", "levels.1", "levels.2", "norm", "head")),
        ("backbone", ("head",)),
    ],
)
def test_the_named_part_takes_no_gradient(what, trained):
    network = make_network()
    freeze(network, what)
    parts = {name: re.match(r"levels\.\d|\w+", name)[0] for name, _ in network.named_parameters()}
    assert {parts[name] for name, p in network.named_parameters() if p.requires_grad} == set(trained)
    assert {parts[name] for name, p in network.named_parameters() if not p.requires_grad}.isdisjoint(trained)


@pytest.mark.parametrize("what", ["level4", "level2..stem", "head..", "stem..levels.2", ""])
def test_an_unknown_part_is_an_error_that_lists_them(what):
    with pytest.raises(UserError, match=rf"freeze must be backbone, one of stem, level0, .*level3.*; got '{what}'"):
        freeze(make_network(), what)


def test_a_frozen_block_drops_no_paths():
    network = make_network()
    freeze(network, "stem..level2")
    set_training(network)
    assert [level.training for level in network.levels] == [False, False, False, True]
    assert not network.levels[2].blocks[0].drop_path1.training
    assert network.levels[3].blocks[0].drop_path1.training


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet10t"])
def test_other_models_of_timm_freeze_by_the_same_words(name):
    network = timm.create_model(name)
    freeze(network, "stem..level1")
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert frozen and not any("head" in name or "fc" in name.split(".")[0] for name in frozen)


def _changed(data, tmp_path, **settings) -> set[str]:
    """The parts of the network whose weights the last epoch changed."""
    fit(make_settings(data, tmp_path / "o", keep_every_epochs=1, **settings))
    first, last = (load_file(tmp_path / "o" / "kept" / f"epoch-000{i}" / "model.safetensors") for i in (1, 2))
    return {key.split(".")[0] for key in first if not torch.equal(first[key], last[key])}


def test_a_linear_probe_changes_the_head_alone(data, tmp_path):
    assert _changed(data, tmp_path, freeze="backbone", epochs=2) == {"head"}


def test_head_only_epochs_change_the_head_alone(data, tmp_path):
    assert _changed(data, tmp_path / "two", head_only_epochs=2, epochs=2) == {"head"}
    assert "levels" in _changed(data, tmp_path / "one", head_only_epochs=1, epochs=2)
