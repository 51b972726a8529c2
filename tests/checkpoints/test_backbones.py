"""Backbones in other people's checkpoints: per-level norms are loaded or refused, wherever the network stands."""

import pytest
import torch
from timm.models import create_model

from nat_models.checkpoints import CheckpointError, convert_state_dict, find_network, fit_state_dict
from tests.networks.zoo import tiny

KINDS = ["nat_mini", "dinat_mini", "dinat_s_tiny"]


def _backbone(name: str) -> dict[str, torch.Tensor]:
    """Ours, as a detector keeps it: without norm and head, with a norm for each level."""
    state_dict = tiny(name, output_norms=True).state_dict()
    return {k: torch.randn_like(v) for k, v in state_dict.items() if not k.startswith(("norm.", "head."))}


def _load(name: str, checkpoint, **kwargs):
    overlay = dict(state_dict=checkpoint, hf_hub_id=None, url="")
    return tiny(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: {"state_dict": {f"backbone.{k}": v for k, v in x.items()} | {"decode_head.conv.bias": torch.ones(3)}},
    ],
    ids=["alone", "in a detector"],
)
@pytest.mark.parametrize("name", KINDS)
def test_norms_of_levels_are_loaded_from_the_authors_files(name, wrap):
    ours = _backbone(name)
    model = _load(name, wrap(convert_state_dict(ours, "original")), features_only=True, output_norms=True)
    loaded = model.model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in ours.items())


@pytest.mark.parametrize("place", ["model.pixel_level_module.encoder.", "backbone.", ""])
def test_norms_of_levels_are_loaded_from_inside_transformers_models(place):
    ours = _backbone("dinat_mini")
    checkpoint = {place + key: value for key, value in convert_state_dict(ours, "transformers").items()}
    if place:
        checkpoint["model.transformer_module.decoder.norm.weight"] = torch.ones(3)
    model = _load("dinat_mini", checkpoint, features_only=True, output_norms=True)
    assert all(torch.equal(model.model.state_dict()[key], value) for key, value in ours.items())


@pytest.mark.parametrize("features_only", [False, True])
def test_norms_of_levels_are_never_dropped_without_a_word(features_only):
    checkpoint = convert_state_dict(_backbone("dinat_mini"), "original")
    with pytest.raises(CheckpointError, match=r"8 unexpected: output_norms\.0\.weight(.|\n)*output_norms=True loads"):
        _load("dinat_mini", checkpoint | _head_and_norm(), features_only=features_only)


def _head_and_norm() -> dict[str, torch.Tensor]:
    whole = convert_state_dict(tiny("dinat_mini").state_dict(), "original")
    return {key: value for key, value in whole.items() if key.startswith(("norm.", "head."))}


def test_norms_of_some_levels_alone_are_refused():
    ours = {k: v for k, v in _backbone("dinat_mini").items() if not k.startswith("output_norms.1.")}
    with pytest.raises(CheckpointError, match=r"2 missing: output_norms\.1\.weight"):
        _load("dinat_mini", ours, features_only=True, output_norms=True)


def test_from_a_classifiers_file_a_backbone_starts_with_new_norms():
    """As the authors' training of detectors does."""
    whole = {key: torch.randn_like(value) for key, value in tiny("nat_mini").state_dict().items()}
    model = _load("nat_mini", whole, features_only=True, output_norms=True).model
    for norm in model.output_norms:
        assert norm.weight.eq(1).all() and not norm.bias.any()
    assert torch.equal(model.levels[3].blocks[0].attn.rpb, whole["levels.3.blocks.0.attn.rpb"])


@pytest.mark.parametrize("name", ["dinat_s_tiny", "nat_isotropic_small", "vitrpb_small"])
def test_a_network_of_patches_is_found_beside_another_vision_transformer(name):
    student = tiny(name)
    teacher = create_model("vit_tiny_patch16_224", depth=1)
    checkpoint = {f"student.{k}": v for k, v in convert_state_dict(student.state_dict(), "original").items()}
    checkpoint |= {f"teacher.{k}": v for k, v in teacher.state_dict().items()}
    assert find_network(checkpoint).place == "checkpoint['student.*']"
    fitted = fit_state_dict(checkpoint, student)
    assert all(torch.equal(fitted[key], value) for key, value in student.state_dict().items())


def test_another_vision_transformer_alone_is_refused():
    teacher = create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(CheckpointError):
        fit_state_dict(teacher.state_dict(), tiny("dinat_s_tiny"))


@pytest.mark.parametrize("name", ["dinat_s_tiny", "vitrpb_small"])
def test_channels_of_patches_and_sizes_of_tables_are_adapted(name):
    state_dict = {key: torch.randn_like(value) for key, value in tiny(name).state_dict().items()}
    gray = _load(name, state_dict, in_chans=1)
    assert torch.allclose(gray.patch_embed.proj.weight, state_dict["patch_embed.proj.weight"].sum(1, keepdim=True))
    window = dict(global_size=7) if name.startswith("vit") else dict(kernel_size=5)
    smaller = _load(name, state_dict, **window)
    side = 2 * next(iter(window.values())) - 1
    assert smaller.levels[0].blocks[0].attn.rpb.shape[1:] == (side, side)


def test_weights_come_from_the_address_of_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    state_dict = convert_state_dict(tiny("dinat_s_tiny").state_dict(), "original")
    torch.save(state_dict, tmp_path / "dinat_s_tiny.pth")
    overlay = dict(url=(tmp_path / "dinat_s_tiny.pth").as_uri())
    model = tiny("dinat_s_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.fc.weight, state_dict["head.weight"])
    with pytest.raises(CheckpointError, match=r"dinat_s_tiny: downloading file:.*nothing\.pth failed"):
        overlay = dict(url=(tmp_path / "nothing.pth").as_uri())
        tiny("dinat_s_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
