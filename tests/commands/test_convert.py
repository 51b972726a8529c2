"""Promises of `nat-models convert`."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from timm.models import create_model, save_for_hf

from nat_models.checkpoints import convert_state_dict, detect_layout
from nat_models.cli import main
from nat_models.conversion import convert
from nat_models.errors import CheckpointError, UserError
from tests.networks.zoo import tiny

SMALL = ["embed_dim=16", "depths=[1,1,2,1]", "num_heads=[1,2,4,8]"]


@pytest.fixture
def network(network):
    return lambda name, **kwargs: _noisy(tiny(name, **kwargs))


def _noisy(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def _pth(model: torch.nn.Module, path, **around):
    torch.save({"state_dict": convert_state_dict(model.state_dict(), "original"), **around}, path)
    return path


def _arguments(model: torch.nn.Module) -> dict:
    given = ("embed_dim", "depths", "num_heads")
    return {key: value for key, value in model._model_args.items() if key in given}


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini", "dinat_base"])
def test_there_and_back_through_every_form_no_bit_is_lost(name, network, tmp_path):
    model = network(name, num_classes=5)
    arguments = _arguments(model)
    path = _pth(model, tmp_path / "model.pth", epoch=3)
    chain, source = {}, path
    for form in ("transformers", "timm", "original"):
        given = dict(name=name, model_kwargs=arguments) if form != "timm" else {}
        chain[form] = convert(source, tmp_path / form, to=form, check=True, **given)
        source = tmp_path / form
        assert chain[form].difference <= 1e-5
        assert chain[form].sha256 == hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert [chain[form].source for form in chain] == ["original", "transformers", "nat_models"]
    back = load_file(tmp_path / "original" / "model.safetensors")
    first = convert_state_dict(model.state_dict(), "original")
    assert back.keys() == first.keys() and all(torch.equal(back[key], first[key]) for key in first)


def test_the_command_prints_what_it_wrote_and_found(network, tmp_path, capsys):
    path = _pth(network("dinat_mini", num_classes=4), tmp_path / "dinat.pth")
    output = tmp_path / "folder"
    flags = ["--checkpoint", str(path), "--model", "dinat_mini", "--model-kwargs", *SMALL]
    assert main(["convert", *flags, "--to", "timm", "--output", str(output), "--check"]) == 0
    printed = capsys.readouterr().out
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    assert f"sha256 {digest}" in printed and "read as original" in printed
    assert float(re.search(r"largest difference (\S+)", printed)[1]) <= 1e-5


def test_timm_loads_the_folder_with_the_dilations_of_the_checkpoint(network, tmp_path):
    dilations = [[1], [3], [1, 2], [1]]
    model = network("dinat_mini", num_classes=4, dilations=dilations)
    path = _pth(model, tmp_path / "model.pth")
    convert(
        path, tmp_path / "a", to="timm", name="dinat_mini", model_kwargs=_arguments(model) | dict(dilations=dilations)
    )
    again = create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))


def test_labels_are_kept_both_ways(network, tmp_path):
    model = network("nat_mini", num_classes=3)
    save_for_hf(
        model, tmp_path / "timm", model_config=dict(label_names=["cat", "dog", "bird"]), safe_serialization=True
    )
    convert(tmp_path / "timm", tmp_path / "theirs", to="transformers")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "bird"} and config["label2id"]["bird"] == 2
    convert(tmp_path / "theirs", tmp_path / "again", to="timm")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["label_names"] == ["cat", "dog", "bird"]


def test_preprocessing_is_that_of_the_published_accuracy(network, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    model = network("nat_mini", num_classes=3)
    convert(
        _pth(model, tmp_path / "m.pth"),
        tmp_path / "a",
        to="transformers",
        name="nat_mini",
        model_kwargs=_arguments(model),
    )
    pixels = (torch.rand(300, 400, 3) * 255).byte().numpy()
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "a")(
        Image.fromarray(pixels), return_tensors="pt"
    )
    ours = create_transform(**resolve_model_data_config(model))(Image.fromarray(pixels))
    assert theirs["pixel_values"].shape == (1, 3, 224, 224)
    # Both cut 224 px out of a short side of 256; two libraries resize, and white noise is the hardest image for it.
    assert (theirs["pixel_values"][0] - ours).abs().mean() < 0.02


def test_the_published_networks_are_told_by_their_configuration(tmp_path):
    data = dict(embed_dim=192, depths=[3, 4, 18, 5], num_heads=[6, 12, 24, 48], mlp_ratio=2.0, kernel_size=7)
    dilations = [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    from nat_models.conversion import describe

    def name(**config) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return describe(tmp_path).name

    assert name(model_type="dinat", **data, dilations=dilations) == "dinat_large_384"
    assert name(model_type="nat") == "nat_mini"
    assert name(model_type="dinat", **data | dict(embed_dim=48), dilations=dilations) == "dinat_mini"


@pytest.mark.parametrize("to", ["timm", "transformers", "original"])
def test_a_backbone_in_a_detector_keeps_its_norms(to, network, tmp_path):
    model = network("dinat_mini", output_norms=True)
    ours = {k: v for k, v in model.state_dict().items() if not k.startswith(("norm.", "head."))}
    around = {f"backbone.{key}": value for key, value in convert_state_dict(ours, "original").items()}
    torch.save({"state_dict": around | {"rpn.conv.bias": torch.ones(2)}}, tmp_path / "detector.pth")
    arguments = dict(name="dinat_mini", model_kwargs=_arguments(model))
    done = convert(tmp_path / "detector.pth", tmp_path / to, to=to, check=True, **arguments)
    tensors = load_file(done.path)
    assert detect_layout(tensors) == dict(timm="nat_models").get(to, to)
    back = convert_state_dict(tensors, "nat_models")
    assert back.keys() == ours.keys() and all(torch.equal(back[key], ours[key]) for key in ours)


def test_the_backbone_of_a_transformers_model_is_taken_out(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from nat_models.integrations import hf_transformers as hf

    data = dict(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], dilations=[[1], [2], [1, 2], [1]])
    config = hf.DinatConfig(**data, out_features=["stage1", "stage2", "stage3", "stage4"])
    sizes = dict(hidden_size=32, auxiliary_channels=16, auxiliary_in_channels=64, num_labels=5)
    model = transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=config, **sizes))
    _noisy(model).save_pretrained(tmp_path / "whole")
    done = convert(tmp_path / "whole", tmp_path / "backbone", to="timm", check=True)
    assert (done.source, "output_norms.3.bias" in load_file(done.path)) == ("transformers", True)


@pytest.mark.parametrize("name", ["dinat_s_tiny", "nat_isotropic_small", "vitrpb_small"])
def test_networks_of_patches_have_timms_form_and_not_transformers(name, network, tmp_path):
    model = network(name, num_classes=3)
    path, arguments = _pth(model, tmp_path / "m.pth"), dict(name=name, model_kwargs=_arguments(model))
    assert convert(path, tmp_path / "a", to="timm", check=True, **arguments).difference == 0
    with pytest.raises(UserError, match="do not have patches"):
        convert(path, tmp_path / "b", to="transformers", **arguments)
    assert not (tmp_path / "b").exists()


class _Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_a_pickle_that_runs_code_is_refused_and_nothing_written(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "evil": _Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"holds more than tensors: .*builtins\.exec"):
        convert(tmp_path / "evil.pth", tmp_path / "a", to="timm", name="nat_mini")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(to="timm"), "no config.json that says what network it is"),
        (dict(to="onnx", name="nat_mini"), "converted to one of timm, transformers, original, got 'onnx'"),
    ],
)
def test_what_is_not_said_is_asked_for(given, message, network, tmp_path):
    path = _pth(network("nat_mini"), tmp_path / "m.pth")
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "a", **given)


@pytest.mark.parametrize("where", ["m.pth", "."])
def test_a_checkpoint_is_not_written_over(where, network, tmp_path):
    _pth(network("nat_mini"), tmp_path / "m.pth")
    with pytest.raises(UserError, match="holds the checkpoint"):
        convert(tmp_path / where, tmp_path, to="timm", name="nat_mini")


def test_another_kind_of_network_is_an_error(network, tmp_path):
    with pytest.raises(UserError, match="Unknown model 'resnet50'"):
        convert(_pth(network("nat_mini"), tmp_path / "m.pth"), tmp_path / "a", to="timm", name="resnet50")


def test_several_labels_stay_several_labels(network, tmp_path):
    model, several = network("nat_mini", num_classes=3), "multi_label_classification"
    save_for_hf(model, tmp_path / "timm", model_config=dict(problem_type=several), safe_serialization=True)
    convert(tmp_path / "timm", tmp_path / "theirs", to="transformers")
    convert(tmp_path / "theirs", tmp_path / "again", to="timm")
    for folder in ("theirs", "again"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["problem_type"] == several


def test_another_networks_configuration_is_an_error(network, tmp_path):
    _pth(network("nat_mini"), tmp_path / "m.pth")
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(UserError, match="is of no NAT"):
        convert(tmp_path / "m.pth", tmp_path / "a", to="timm")


def test_a_difference_is_an_error(network, tmp_path, monkeypatch):
    model = network("nat_mini", num_classes=3)
    monkeypatch.setattr("nat_models.conversion._difference", lambda *args: 0.1)
    with pytest.raises(UserError, match=r"differ by 1\.0e-01"):
        convert(
            _pth(model, tmp_path / "m.pth"),
            tmp_path / "a",
            to="timm",
            name="nat_mini",
            model_kwargs=_arguments(model),
            check=True,
        )
