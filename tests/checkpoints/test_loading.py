"""Loading: three layouts, wrapped or not, with any head, window and channels; never a silent partial load."""

import types

import pytest
import timm
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file
from timm.models import create_model, save_for_hf

from nat_models.checkpoints import LAYOUTS, CheckpointError, convert_state_dict, fit_state_dict, loading
from tests.checkpoints.conftest import SMALL, load_file, random_state_dict, same_tensors, small_network
from tests.conftest import original_state_dict

IMAGE = torch.linspace(-2, 2, 3 * 64 * 64).sin().view(1, 3, 64, 64)


def _load(state_dict, **kwargs):
    overlay = dict(state_dict=dict(state_dict), hf_hub_id=None)
    return create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **(SMALL | kwargs)).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_to_the_same_network(layout):
    state_dict = random_state_dict("original")
    expected = _load(state_dict)(IMAGE)
    assert torch.equal(_load(convert_state_dict(state_dict, layout))(IMAGE), expected)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_training_checkpoints_are_unwrapped(tmp_path, wrapper, prefix):
    state_dict = random_state_dict("original")
    checkpoint = {prefix + k: v for k, v in state_dict.items()}
    if wrapper is not None:
        checkpoint = {wrapper: checkpoint, "epoch": 3}
    path = tmp_path / "nat_mini.pth"
    torch.save(checkpoint, path)
    assert same_tensors(load_file(path), state_dict)


def test_ema_weights_win(tmp_path):
    ema, raw = random_state_dict("original"), random_state_dict("original")
    path = tmp_path / "nat_mini.pth"
    torch.save({"state_dict": raw, "state_dict_ema": ema}, path)
    assert same_tensors(load_file(path), ema)


def test_our_layout_loads_from_safetensors_both_ways(tmp_path):
    state_dict = random_state_dict("nat_models")
    path = tmp_path / "model.safetensors"
    save_file(state_dict, path)
    assert same_tensors(load_file(path), state_dict)
    assert same_tensors(create_model("nat_mini", checkpoint_path=str(path), **SMALL), state_dict)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_number_of_classes_keeps_the_backbone_and_makes_a_new_head(layout):
    state_dict = random_state_dict(layout)
    model = _load(state_dict, num_classes=7)
    assert model.head.fc.weight.shape == (7, 128)
    assert same_tensors(model, state_dict, without="head")
    assert same_tensors(_load(state_dict, num_classes=0), state_dict, without="head")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fine_tunes_load_with_their_own_number_of_classes(layout):
    state_dict = random_state_dict(layout, num_classes=7)
    assert same_tensors(_load(state_dict, num_classes=7), state_dict)
    # A fine-tune of a fine-tune: the third number of classes makes a new head.
    assert same_tensors(_load(state_dict, num_classes=5), state_dict, without="head")


def test_a_fine_tune_without_its_number_of_classes_is_an_error():
    with pytest.raises(CheckpointError, match=r"head has 7 classes, the model's 1000. Pass num_classes=7"):
        _load(random_state_dict("transformers", num_classes=7))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backbone_without_head_loads_where_no_head_is_asked_for(layout):
    state_dict = random_state_dict(layout, num_classes=0)
    if layout == "transformers":
        state_dict = {k.removeprefix("nat."): v for k, v in state_dict.items()}  # NatModel, NatBackbone
    assert same_tensors(_load(state_dict, num_classes=0), state_dict)
    assert same_tensors(_load(state_dict, num_classes=3), state_dict)
    features = _load(state_dict, features_only=True)(IMAGE)
    assert [f.shape[1] for f in features] == [16, 32, 64, 128]
    with pytest.raises(CheckpointError, match=r"2 missing: head.fc.weight, head.fc.bias"):
        _load(state_dict)


def test_features_only_uses_the_weights():
    state_dict = random_state_dict("transformers")
    features = _load(state_dict, features_only=True)(IMAGE)
    torch.testing.assert_close(features, _load(state_dict).forward_intermediates(IMAGE, intermediates_only=True))


@pytest.mark.parametrize("in_chans", [1, 2, 5])
def test_in_chans_adapts_the_stem_as_timm_does(in_chans):
    state_dict = random_state_dict("original")
    model = _load(state_dict, in_chans=in_chans)
    stem = state_dict["patch_embed.proj.0.weight"]
    expected = timm.models.adapt_input_conv(in_chans, stem)
    assert torch.equal(model.patch_embed.proj[0].weight, expected)
    assert same_tensors(model, state_dict, without="patch_embed.proj.0.weight")


@pytest.mark.parametrize("kernel_size", [5, 9, (3, 7)])
def test_another_kernel_size_interpolates_rpb(kernel_size):
    state_dict = random_state_dict("transformers")
    rpb = torch.arange(13.0)[:, None] + 10 * torch.arange(13.0)  # a plane, which bicubic keeps inside
    for key, value in state_dict.items():
        if key.endswith("rpb"):
            state_dict[key] = rpb.expand_as(value).clone()
    model = _load(state_dict, kernel_size=kernel_size)
    rows, cols = (2 * k - 1 for k in (kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * 2))
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            assert parameter.shape[1:] == (rows, cols)
            # The centre, offset (0, 0), stays where it is.
            torch.testing.assert_close(parameter[:, rows // 2, cols // 2], rpb[6, 6].expand(len(parameter)))
    assert model(IMAGE).isfinite().all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("norm.weight"), r"\n1 missing: norm\.weight\.$"),
        (lambda d: d.update(extra=torch.zeros(1)), r"1 unexpected: extra\.$"),
        (
            lambda d: d.update({"levels.2.blocks.1.attn.proj.bias": torch.zeros(65)}),
            r"1 of another shape: levels\.2\.blocks\.1\.attn\.proj\.bias found \(65,\) expected \(64,\)",
        ),
        (
            lambda d: d.update({"levels.0.blocks.0.attn.rpb": torch.zeros(3, 13, 13)}),
            r"1 of another shape: levels\.0\.blocks\.0\.attn\.rpb found \(3, 13, 13\) expected \(1, 13, 13\)",
        ),
        (
            lambda d: d.update({"patch_embed.proj.0.weight": torch.zeros(9, 3, 3, 3)}),
            r"patch_embed\.proj\.0\.weight found \(9, 3, 3, 3\) expected \(8, 3, 3, 3\)",
        ),
    ],
)
@pytest.mark.parametrize("num_classes", [1000, 7])
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(edit, message, num_classes):
    # Also with a new head, where timm alone would load whatever fits.
    state_dict = random_state_dict("original")
    edit(state_dict)
    with pytest.raises(CheckpointError, match=message):
        _load(state_dict, num_classes=num_classes)


def test_an_incomplete_qkv_is_listed():
    state_dict = random_state_dict("transformers")
    del state_dict["nat.encoder.levels.0.layers.0.attention.self.key.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: levels\.0\.blocks\.0\.attn\.qkv\.weight"):
        _load(state_dict)


def test_another_variant_is_refused_with_shapes():
    with pytest.raises(
        CheckpointError, match=r"(?s)unexpected.*of another shape: .*found \(48, 3, 3, 3\) expected \(32, 3, 3, 3\)"
    ):
        overlay = dict(state_dict=original_state_dict("nat_small"), hf_hub_id=None)
        create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay)


def test_another_architecture_is_refused_with_the_layouts_expected():
    overlay = dict(state_dict=create_model("resnet18").state_dict(), hf_hub_id=None)
    with pytest.raises(
        CheckpointError, match=r"not a NAT in a known layout. Found keys such as 'conv1\.weight'.*expected"
    ):
        create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay)


def test_save_for_hf_and_local_dir_are_inverse(tmp_path):
    model = small_network(num_classes=4, in_chans=1, kernel_size=5)
    labels = ["ant", "bee", "cat", "dog"]
    save_for_hf(
        model,
        tmp_path,
        model_config=dict(label_names=labels),
        model_args=dict(SMALL, kernel_size=5, in_chans=1),  # timm before 1.0.31 does not record them itself
        safe_serialization=True,
    )
    loaded = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(1, 1, 48, 80)
    assert torch.equal(loaded(image), model(image))
    assert loaded.pretrained_cfg["label_names"] == labels
    with_new_head = create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9)
    assert with_new_head.head.fc.out_features == 9
    assert same_tensors(with_new_head, model.state_dict(), without="head")


def test_fitting_changes_neither_checkpoint_nor_model_nor_configuration():
    model = small_network(num_classes=7)
    cfg, weights = dict(model.pretrained_cfg), {k: v.clone() for k, v in model.state_dict().items()}
    for num_classes in (7, 3):  # a head that is kept, a head that is left out
        checkpoint = random_state_dict("original", num_classes=num_classes)
        keys = list(checkpoint)
        fit_state_dict({"state_dict": checkpoint}, model)
        assert list(checkpoint) == keys
    assert model.pretrained_cfg == cfg
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_new_head_is_the_models_own():
    model = small_network(num_classes=7)
    fitted = fit_state_dict(random_state_dict("transformers"), model)
    assert torch.equal(fitted["head.fc.weight"], model.head.fc.weight)
    assert torch.equal(fitted["head.fc.bias"], model.head.fc.bias)


def test_cache_dir_is_where_timm_is_told_to_keep_downloads(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("nat_models.checkpoints.loading.load_pretrained", lambda *args, **kw: seen.append(kw))
    create_model("nat_mini", pretrained=True, cache_dir=str(tmp_path), **SMALL)
    assert seen[0]["cache_dir"] == str(tmp_path)


@pytest.mark.parametrize(("extra", "ending"), [(6, "extra5."), (7, "and 1 more."), (50, "and 44 more.")])
def test_a_long_list_of_keys_is_cut_and_counted(extra, ending):
    state_dict = random_state_dict("original") | {f"extra{i}": torch.zeros(1) for i in sorted(range(extra), key=str)}
    with pytest.raises(CheckpointError, match=f"{extra} unexpected: extra0, .*") as refused:
        _load(state_dict)
    assert str(refused.value).endswith(ending)


def test_a_damaged_download_is_named_by_its_path_in_the_cache(monkeypatch, tmp_path):
    damaged, found = tmp_path / "pytorch_model.bin", {}
    damaged.write_bytes(b"PK\x03\x04 cut")

    def cached(repo, file, *, cache_dir, revision):
        return found.get(file) if (repo, cache_dir, revision) == ("a/b", "cache", "v1") else None

    def unreadable(cache_dir="cache", **cfg) -> str:
        return loading._unreadable({"hf_hub_id": "a/b@v1", **cfg}, cache_dir, EOFError("short"))

    monkeypatch.setattr(loading, "try_to_load_from_cache", cached)
    assert unreadable().startswith("a/b@v1 cannot be read")
    found["pytorch_model.bin"] = str(damaged)
    message = unreadable()
    assert message.startswith(f"{damaged} cannot be read: it is cut off")
    assert "Delete it and load again" in message and "(EOFError: short)" in message
    damaged.with_name("model.safetensors").write_bytes(b"")
    found["model.safetensors"] = str(damaged.with_name("model.safetensors"))
    assert "model.safetensors cannot be read: it is empty. Delete it" in unreadable()
    assert unreadable(cache_dir=None).startswith("a/b@v1 cannot be read")
    assert unreadable(hf_hub_id="a/b").startswith("a/b cannot be read")
    assert unreadable(hf_hub_id="c/d@v1").startswith("c/d@v1 cannot be read")
    assert "own.pth cannot be read" in unreadable(file="own.pth")


def test_all_that_does_not_fit_is_listed_at_once():
    state_dict = {"extra": torch.zeros(1)} | random_state_dict("original")  # found first, and not the only one
    del state_dict["norm.weight"]
    state_dict["norm.bias"] = torch.zeros(3)
    listed = r"1 missing: norm\.weight\.\n1 unexpected: extra\.\n1 of another shape: norm\.bias found"
    with pytest.raises(CheckpointError, match=rf"nothing was loaded\.\n{listed}"):
        _load(state_dict)


def test_a_checkpoint_alone_is_fitted_by_what_the_models_configuration_declares():
    with pytest.raises(CheckpointError, match="head has 7 classes, the model's 1000"):
        fit_state_dict(random_state_dict("original", num_classes=7), small_network())
    fitted = fit_state_dict(random_state_dict("original", num_classes=7), small_network(), num_classes=7)
    assert fitted["head.fc.weight"].shape == (1000, 128)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_a_checkpoint_in_memory_is_unwrapped_and_its_average_wins(wrapper):
    model, state_dict = small_network(), random_state_dict("nat_models")
    others = dict.fromkeys(
        {"model", "state_dict"} - {wrapper} if "ema" in wrapper else (), random_state_dict("original")
    )
    fitted = fit_state_dict({**others, wrapper: state_dict, "epoch": 3}, model)
    assert all(torch.equal(fitted[key], value) for key, value in state_dict.items())


_RESPONSE = types.SimpleNamespace(headers={}, request=None, status_code=500, url="")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalEntryNotFoundError("why"),
            r"nat_mini: a/b on the Hugging Face Hub is neither in the local cache.*\(why\)",
        ),
        (FileNotFoundError("why"), r"nat_mini: there is no weights file a/b on the Hugging Face Hub\. why"),
        (EOFError("why"), r"nat_mini: a/b cannot be read: .*\(EOFError: why\)"),
        (RuntimeError("PytorchStreamReader failed"), r"nat_mini: a/b cannot be read: .*\(RuntimeError: Pytorch"),
        (
            HfHubHTTPError("why", response=_RESPONSE),
            r"nat_mini: downloading a/b on the Hugging Face Hub failed\. \(why",
        ),
        (RepositoryNotFoundError("why", response=_RESPONSE), r"nat_mini: there is no repository a/b .*\(why"),
        (EntryNotFoundError("why"), r"nat_mini: a/b on the Hugging Face Hub holds no weights.*\(why"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_what_goes_wrong_with_the_hub_is_explained_with_its_cause(error, message):
    with (
        pytest.raises(CheckpointError, match=message) as raised,
        loading.explain_errors("nat_mini", {"hf_hub_id": "a/b"}),
    ):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), CheckpointError("says weights_only"), KeyError("x")]
)
def test_an_error_that_is_none_of_the_weights_passes_as_it_is(error):
    with pytest.raises(type(error)) as raised, loading.explain_errors("nat_mini", {"hf_hub_id": "a/b"}):
        raise error
    assert raised.value is error
