"""nat-models push: the real client against a hub on 127.0.0.1, and what others then load from it."""

import json
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load
from timm.data.model_config import resolve_input_data_config

from nat_models.checkpoints import convert_state_dict
from nat_models.checkpoints.saving import save_for_transformers, save_model, transformers_config
from nat_models.cli import main
from nat_models.errors import UserError
from nat_models.training.cards import Facts
from tests.hub import Hub, client_environment, commit_of, connect

TINY = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3)
NAMES = ["zebra", "ape", "cat", "dog"]
REPO = "someone/zoo"
SIZE = 48


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    connect(monkeypatch, hub.endpoint, "hf_someone")
    yield hub
    hub.close()


def network(**kwargs):
    return timm.create_model("nat_mini", **{**dict(num_classes=len(NAMES), init_values=1e-5), **TINY, **kwargs}).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a run keeps of a network: weights, configuration and facts."""
    folder = tmp_path / "best"
    folder.mkdir()
    model = network()
    data_config = resolve_input_data_config(model, dict(img_size=SIZE, crop_pct=0.9))
    save_model(model, folder, model_config=dict(label_names=NAMES), data_config=data_config)
    facts = dict(figures={"top1": 91.25, "val_loss": 0.4}, recipe={"lr": 0.002}, digest="d" * 64)
    Facts("nat_mini, trained on zoo", "Trained on a zoo.", "zoo", **facts, base_model="someone/base").write(folder)
    return folder


def push(folder, *flags) -> int:
    return main(["push", "--model", str(folder), "--repo", REPO, *flags])


def error(capsys) -> str:
    text = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(text) == 1
    return text[0]


def images() -> torch.Tensor:
    return torch.linspace(-2, 2, 2 * 3 * SIZE * SIZE).sin().view(2, 3, SIZE, SIZE)


@pytest.fixture
def pulled(hub, hub_clients):
    """The logits of a network that another process, with an empty cache, makes of what the hub has."""

    def pulled(cache: Path, create: str, **environment: str) -> torch.Tensor:
        code = f"""
import timm, torch, nat_models
model = {create}.eval()
x = torch.linspace(-2, 2, 2 * 3 * {SIZE} * {SIZE}).sin().view(2, 3, {SIZE}, {SIZE})
torch.save(model(x).detach(), {str(cache.with_suffix(".pt"))!r})
"""
        done = hub_clients.run(code=code, environment=client_environment(hub.endpoint, cache) | environment)
        assert done.returncode == 0, done.stderr
        return torch.load(cache.with_suffix(".pt"))

    return pulled


def front_matter(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_what_is_pushed_is_pulled_bitwise_in_another_process_at_a_branch_too_and_then_offline(
    hub, folder, tmp_path, pulled
):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert push(folder, "--revision", "v1", "--message", "first") == 0
    assert hub.messages == ["first"]
    assert set(hub.files[REPO]) == {".gitattributes"}
    pinned = commit_of(hub.branches[REPO, "v1"])
    for revision in ("v1", pinned):
        create = f'timm.create_model("hf-hub:{REPO}@{revision}", pretrained=True)'
        assert torch.equal(pulled(tmp_path / "cache", create), model(images()))
    hub.requests.clear()
    assert torch.equal(pulled(tmp_path / "cache", create, HF_HUB_OFFLINE="1"), model(images()))
    assert not hub.requests
    files = hub.branches[REPO, "v1"]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert json.loads(files["config.json"])["label_names"] == NAMES


def test_a_file_of_the_authors_layout_is_pushed_in_the_hubs_and_pulled_as_its_card_says(hub, tmp_path, pulled):
    model = network()
    torch.save({"state_dict": convert_state_dict(model.state_dict(), "original")}, tmp_path / "own.pth")
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    kwargs = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in TINY.items()]
    flags = [
        "--checkpoint",
        str(tmp_path / "own.pth"),
        "--model-kwargs",
        *kwargs,
        "init_values=1.0e-5",
    ]  # YAML takes 1e-5 for a word
    flags += ["--num-classes", "4", "--class-names", str(tmp_path / "names.txt"), "--license", "apache-2.0"]
    flags += ["--figures", "top1=71.5", "--dataset", "zoo", "--format", "transformers"]
    assert push("nat_mini", *flags) == 0
    files = hub.files[REPO]
    config = json.loads(files["config.json"])
    assert (config["model_type"], config["id2label"]["2"], config["label2id"]["dog"]) == ("nat", "cat", 3)
    assert set(load(files["model.safetensors"])) == set(convert_state_dict(model.state_dict(), "transformers"))
    head = front_matter(files["README.md"])
    assert (head["license"], head["library_name"]) == ("apache-2.0", "transformers")
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == 71.5
    (create,) = [line for line in files["README.md"].decode().splitlines() if line.startswith("model = ")]
    create = create.removeprefix("model = ").removesuffix(".eval()")
    assert torch.equal(pulled(tmp_path / "cache", create), model(images()))


def test_a_card_tells_licence_figures_recipe_preprocessing_and_use(hub, folder, capsys):
    assert push(folder, "--license", "mit") == 0
    card = hub.files[REPO]["README.md"]
    head = front_matter(card)
    assert (head["license"], head["library_name"], head["base_model"]) == ("mit", "timm", "someone/base")
    assert head["pipeline_tag"] == "image-classification" and "nat_models" in head["tags"]
    (results,) = head["model-index"][0]["results"]
    assert results["dataset"]["name"] == "zoo"
    assert [(m["type"], m["value"]) for m in results["metrics"]] == [("accuracy", 91.25)]
    text = card.decode()
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in text and "FOLDER" not in text
    assert f'load_file(hf_hub_download("{REPO}", "model.safetensors"))' in text
    for part in ("Classes: zebra, ape, cat, dog", "lr: 0.002", "- crop_pct: 0.9", "| top1 | 91.25 |", "d" * 16):
        assert part in text
    assert f"{REPO}@{commit_of(hub.files[REPO])}" in capsys.readouterr().out
    hub.files[REPO]["README.md"] = b"written by hand"
    assert push(folder, "--no-card") == 0
    assert hub.files[REPO]["README.md"] == b"written by hand"


def test_a_dry_run_lists_files_and_prints_the_card_without_a_connection_or_a_token(folder, capsys, monkeypatch):
    connect(monkeypatch, "http://127.0.0.1:9", None)
    assert push(folder, "--dry-run", "--format", "transformers") == 0
    out = capsys.readouterr().out
    listed = [line.split()[1] for line in out.partition("sha256")[0].splitlines()]
    assert listed == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert "# nat_mini, trained on zoo" in out and "library_name: transformers" in out


def test_an_upload_that_is_cut_off_leaves_the_repository_as_it_was_and_pushing_again_completes_it(
    hub, folder, capsys, monkeypatch
):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits longer with every try
    hub.cut_off = 100
    assert push(folder) == 2
    assert f"{REPO} is as it was. Push again." in error(capsys)
    assert hub.cut_off < 100
    assert set(hub.files[REPO]) == {".gitattributes"} and not hub.large
    hub.cut_off = 1  # the client tries again by itself
    assert push(folder) == 0
    assert hub.files[REPO]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("token", "repo", "flags", "message"),
    [
        (None, REPO, [], "There is no token for the Hub: run `hf auth login`, or set HF_TOKEN."),
        ("hf_wrong", REPO, [], "The Hub does not accept the token"),
        ("hf_someone", "other/zoo", [], "The token may not write to other/zoo"),
        ("hf_someone", "zoo", [], "A repository is named USER/NAME, got 'zoo'"),
        ("hf_someone", "some one/zoo", [], "A repository is named USER/NAME, got 'some one/zoo'"),
        ("hf_someone", "someone/public", ["--private"], "someone/public is there already and is public"),
        ("hf_someone", REPO, ["--no-pretrained"], "There are no weights to push"),
        ("hf_someone", REPO, ["--figures", "top1=good"], "--figures takes numbers, got top1='good'"),
    ],
)
def test_what_forbids_a_push_is_one_line(hub, folder, capsys, monkeypatch, token, repo, flags, message):
    hub.files["someone/public"] = {"README.md": b"public"}
    connect(monkeypatch, hub.endpoint, token)
    assert main(["push", "--model", str(folder), "--repo", repo, *flags]) == 2
    assert message in error(capsys)
    assert hub.files == {"someone/public": {"README.md": b"public"}}


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached_is_one_line(folder, capsys, monkeypatch, offline):
    connect(monkeypatch, "http://127.0.0.1:9", "hf_someone")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert push(folder) == 2
    assert "The Hub at http://127.0.0.1:9 cannot be reached" in error(capsys)


def test_a_private_repository_is_for_its_owner_alone(hub, folder):
    assert push(folder, "--private") == 0
    assert hub.private == {REPO}


def test_the_configuration_is_that_of_transformers():
    config = transformers_config(network(mlp_ratio=2, drop_path_rate=0.3), NAMES)
    assert config["architectures"] == ["NatForImageClassification"]
    shape = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], kernel_size=3, mlp_ratio=2.0, patch_size=4)
    more = dict(qkv_bias=True, layer_scale_init_value=1e-5, num_channels=3, layer_norm_eps=1e-5, hidden_act="gelu")
    assert {name: config[name] for name in (*shape, *more)} == shape | more
    assert config["drop_path_rate"] == pytest.approx(0.3)
    assert transformers_config(network(init_values=None), NAMES)["layer_scale_init_value"] == 0.0
    cranes = transformers_config(network(num_classes=2), ["n02012849", "n03126707"])["id2label"]
    assert len(set(cranes.values())) == 2 and all("crane" in name for name in cranes.values())


def test_a_network_with_dilations_is_transformers_dinat(tmp_path):
    model = network()
    model.levels[1].blocks[0].attn.dilation = (2, 2)
    data_config = resolve_input_data_config(model, dict(img_size=SIZE))
    save_for_transformers(model, tmp_path, classes=NAMES, data_config=data_config)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["dilations"]) == ("dinat", [[1], [2], [1], [1]])
    keys = load((tmp_path / "model.safetensors").read_bytes())
    assert {key.split(".")[0] for key in keys} == {"dinat", "classifier"}


@pytest.mark.parametrize(
    ("kwargs", "lacking"),
    [
        (dict(kernel_size=(3, 5)), "not square"),
        (dict(global_pool="max"), "the pooling 'max'"),
    ],
)
def test_what_transformers_does_not_have_is_refused(kwargs, lacking):
    with pytest.raises(UserError, match=f"do not have .*{lacking}.*: timm's form does"):
        transformers_config(network(**kwargs), NAMES)


def test_transformers_prepares_an_image_as_timm_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = network()
    data_config = resolve_input_data_config(model, dict(img_size=SIZE))
    save_for_transformers(model, tmp_path, classes=NAMES, data_config=data_config)
    image = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGB")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)(image, return_tensors="pt")
    ours = timm.data.create_transform(**data_config)(image)
    # A crop that cannot be centred may begin a pixel apart, and the resizing rounds to whole grey levels of 255.
    torch.testing.assert_close(theirs["pixel_values"][0], ours, rtol=0, atol=1.5 / 255 / 0.22)


def test_the_figures_of_a_run_are_not_those_of_another_network(folder, capsys):
    assert push(folder, "--dry-run") == 0
    assert "91.25" in capsys.readouterr().out
    assert push(folder, "--dry-run", "--model-kwargs", "kernel_size=5") == 0
    assert "91.25" not in capsys.readouterr().out
