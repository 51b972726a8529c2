"""Layouts: the published keys, and conversions that lose nothing."""

import json

import pytest
import torch
from timm.models import create_model

from nat_models.checkpoints import LAYOUTS, CheckpointError, convert_state_dict, detect_layout
from tests.checkpoints.conftest import random_state_dict
from tests.conftest import FIXTURES, original_state_dict

# With layer scale (small) and without (mini): the two kinds of block.
VARIANTS = ["nat_mini", "nat_small"]
ORIGINAL = json.loads((FIXTURES / "original_keys.json").read_text())
IN_TRANSFORMERS = [name for name, keys in ORIGINAL.items() if "patch_embed.proj.0.weight" in keys]
NORMS = {f"norm{i}.{name}": torch.randn(6) for i in range(4) for name in ("weight", "bias")}


def _meta(variant: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in ORIGINAL[variant].items()}


def _random(variant: str) -> dict[str, torch.Tensor]:
    """The keys of a variant, with small tensors of as many axes; rows divide into query, key and value."""
    return {key: torch.randn([6] * len(shape)) for key, shape in ORIGINAL[variant].items()}


def _equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_shapes_of_the_published_layouts(variant):
    original = original_state_dict(variant)
    transformers = convert_state_dict(original, "transformers")
    published = json.loads((FIXTURES / "transformers_keys.json").read_text())[variant]
    assert {k: list(v.shape) for k, v in transformers.items()} == published
    ours = create_model(variant, device="meta").state_dict()
    converted = convert_state_dict(transformers, "nat_models")
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("variant", ORIGINAL)
def test_the_authors_keys_and_shapes_are_those_of_our_network(variant):
    ours = create_model(variant, device="meta").state_dict()
    converted = convert_state_dict(_meta(variant), "nat_models")
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("variant", ORIGINAL)
def test_ways_through_the_layouts_lose_no_bit(variant):
    original = _random(variant)
    ours = convert_state_dict(original, "nat_models")
    index = {key for key in original if key.endswith("relative_position_index")}  # follows from the table's size
    assert _equal(convert_state_dict(ours, "original"), {k: v for k, v in original.items() if k not in index})
    assert len(ours) == len(original) - len(index)
    if variant in IN_TRANSFORMERS:
        model_type = variant.split("_")[0]
        theirs = convert_state_dict(ours, "transformers", model_type=model_type)
        assert all(key.startswith((f"{model_type}.", "classifier.")) for key in theirs)
        assert detect_layout(theirs) == "transformers"
        assert _equal(convert_state_dict(theirs, "nat_models"), ours)
    else:
        with pytest.raises(CheckpointError, match="has no layout for networks of patches"):
            convert_state_dict(ours, "transformers")


@pytest.mark.parametrize("variant", ["dinat_base", "dinat_s_tiny"])
def test_a_backbones_norms_go_through_the_layouts(variant):
    original = {k: v for k, v in _random(variant).items() if not k.startswith(("norm.", "head."))} | NORMS
    assert detect_layout(original) == "original"
    ours = convert_state_dict(original, "nat_models")
    assert torch.equal(ours["output_norms.2.bias"], NORMS["norm2.bias"])
    assert _equal(convert_state_dict(ours, "original"), original)
    if variant in IN_TRANSFORMERS:
        theirs = convert_state_dict(ours, "transformers")
        assert torch.equal(theirs["hidden_states_norms.stage3.bias"], NORMS["norm2.bias"])
        assert all(key.startswith(("embeddings.", "encoder.", "hidden_states_norms.")) for key in theirs)
        assert _equal(convert_state_dict(theirs, "nat_models"), ours)


def test_an_unknown_model_type_is_an_error():
    with pytest.raises(ValueError, match="got model_type='swin'"):
        convert_state_dict(random_state_dict("original"), "transformers", model_type="swin")


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_conversions_are_lossless_both_ways(source, target):
    state_dict = random_state_dict(source)
    converted = convert_state_dict(state_dict, target)
    assert detect_layout(state_dict) == source and detect_layout(converted) == target
    back = convert_state_dict(converted, source)
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[k], v) for k, v in state_dict.items())


def test_an_unknown_layout_name_is_an_error():
    with pytest.raises(ValueError, match="got layout='timm'"):
        convert_state_dict(random_state_dict("original"), "timm")


@pytest.mark.parametrize("key", ["extra", "levels.1.blocks.0.attn.extra.weight", "levels.x", "levels.1.extra.weight"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_that_no_layout_knows_keep_their_names(key, layout):
    state_dict = random_state_dict("original") | {key: torch.zeros(1)}
    assert key in convert_state_dict(state_dict, layout)


def test_one_layer_scale_without_the_other_is_an_error():
    state_dict = random_state_dict("original")
    del state_dict["levels.2.blocks.1.gamma2"]
    with pytest.raises(CheckpointError, match=r"has levels\.2\.blocks\.1\.gamma1 without .*gamma2"):
        convert_state_dict(state_dict, "transformers")


@pytest.mark.parametrize("key", ["nat.encoder.levels.0.layers.0.extra.weight", "nat.extra", "extra"])
def test_keys_that_transformers_does_not_know_keep_their_names(key):
    state_dict = random_state_dict("transformers") | {key: torch.zeros(1)}
    assert any(name.endswith(key) for name in convert_state_dict(state_dict, "nat_models"))


@pytest.mark.parametrize("prefix", ["", "nat.", "dinat."])
@pytest.mark.parametrize("key", ["embeddings.norm.weight", "encoder.levels.0.layers.0.layernorm_before.bias"])
def test_one_key_of_transformers_tells_its_layout(prefix, key):
    assert detect_layout({f"{prefix}{key}": torch.zeros(1)}) == "transformers"


@pytest.mark.parametrize(
    "key",
    ["levels.0.downsample.norm.bias", "head.weight", "head.bias"] + [f"levels.2.blocks.1.gamma{i}" for i in (1, 2)],
)
def test_one_key_of_the_authors_tells_their_layout_from_ours(key):
    stem = {"patch_embed.proj.0.weight": torch.zeros(1)}
    assert detect_layout(stem) == "nat_models"
    assert detect_layout(stem | {key: torch.zeros(1)}) == "original"


def test_keys_of_no_layout_are_named_four_of_them_and_none_is_said():
    with pytest.raises(CheckpointError, match=r"keys such as 'a0', 'a1', 'a2', 'a3'; expected patch_embed\.proj"):
        detect_layout({f"a{i}": torch.zeros(1) for i in range(9)})
    with pytest.raises(CheckpointError, match=r"such as \(none\); .*levels\.0\..*, \.\.\. \(nat_models and original"):
        detect_layout({})
