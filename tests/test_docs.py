"""The how-tos of README.md and docs/ run as printed: their Python, and their commands but for make, which calls this
suite."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save
from sklearn.datasets import load_sample_images

from nat_models.checkpoints import convert_state_dict
from nat_models.checkpoints.saving import synsets, transformers_config
from nat_models.cli import main
from tests.conftest import original_state_dict
from tests.forks import Forks
from tests.hub import Hub, client_environment
from tests.training.boxed import put_roboflow

ROOT = Path(__file__).parents[1]
# page: how many blocks of it run
PAGES = {
    "README.md": 6,
    "docs/inference.md": 2,
    "docs/export.md": 5,
    "docs/adapting.md": 3,
    "docs/operator.md": 4,
    "docs/natten_legacy.md": 4,
    "docs/benchmarks.md": 0,
    "docs/finetune.md": 3,
    "docs/evaluate.md": 2,
    "docs/features.md": 2,
    "docs/publishing.md": 5,
    "docs/transformers.md": 4,
    "docs/resume.md": 1,
    "docs/tables.md": 2,
    "docs/segmentation_data.md": 1,
    "docs/detection_data.md": 1,
    "docs/segmentation.md": 5,
    "docs/detection.md": 5,
    "docs/imbalance.md": 1,
    "docs/scaling.md": 0,
    "docs/fashion_mnist.md": 0,
    "docs/compared.md": 0,
}


def _blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|bash)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    weights = save(convert_state_dict(original_state_dict("nat_tiny"), "transformers"), metadata=dict(format="pt"))
    network = timm.create_model("nat_tiny", device="meta")
    config = json.dumps(transformers_config(network, synsets(network))).encode()
    hub.files["shi-labs/nat-tiny-in1k-224"] = {"model.safetensors": weights, "config.json": config}
    hub.tokens = {"hf_user": "user"}
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with what a reader is told to have: a photo, images in class folders, a street with masks, pets with
    boxes, the authors' file."""
    from PIL import Image

    desk = tmp_path_factory.mktemp("desk")
    photos = [Image.fromarray(x) for x in load_sample_images().images]
    photos[0].save(desk / "photo.jpg")
    for label, photo in zip(("building", "flower"), photos, strict=True):
        for i in range(6):
            path = desk / "images" / label / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.crop((40 * i, 20 * i, 40 * i + 240, 20 * i + 240)).save(path)
    for side in ("images", "masks"):
        (desk / "street" / side).mkdir(parents=True)
    for i in range(8):
        photos[0].crop((40 * i, 0, 40 * i + 64, 48)).save(desk / "street" / "images" / f"{i}.jpg")
        Image.new("L", (64, 48)).point(lambda _, i=i: 7 * (i % 2)).save(desk / "street" / "masks" / f"{i}.png")
    (desk / "street" / "classes.json").write_text('{"values": {"0": "background", "7": "road"}}')
    put_roboflow(desk / "pets")
    torch.save(original_state_dict("nat_tiny"), desk / "nat_tiny.pth")
    shapes = json.loads((ROOT / "tests/fixtures/detection_keys.json").read_text())["mask_rcnn_nat_mini"]
    torch.save({key: torch.ones(1).expand(shape) for key, shape in shapes.items()}, desk / "mask_rcnn_nat_mini.pth")
    return desk


@pytest.fixture(scope="module")
def forks(hub, desk):
    environment = {**os.environ, **client_environment(hub.endpoint, desk / "cache"), "HF_TOKEN": "hf_user"}
    forks = Forks(environment, desk)
    yield forks
    forks.close()


# Pages that need no published weights run in this process, which spares importing PyTorch for every line.
LOCAL = (
    "docs/finetune.md",
    "docs/evaluate.md",
    "docs/features.md",
    "docs/resume.md",
    "docs/tables.md",
    "docs/segmentation_data.md",
    "docs/detection_data.md",
    "docs/imbalance.md",
    "docs/segmentation.md",
    "docs/detection.md",
)
# Most of their time is an exporter's and a compiler's, which tests/test_export.py, test_onnx_operator.py and
# test_optimize.py call too.
SLOW = ("docs/export.md", "docs/inference.md")
# So it is of blocks of these that export, or trace whole systems: with them the pages are slow, and without, not.
WHOLE = [pytest.param(page, True, marks=pytest.mark.slow) for page in ("docs/segmentation.md", "docs/detection.md")]
SLOW_BLOCKS = ("nat-models export", "nat-models complexity")
# Their runs begin at random weights: a recipe would ask for the published ones.
SHORT = ["--warmup-epochs", "0", "--workers", "0", "--batch-size", "4", "--val-fraction", "0.4"]


def _commands(block: str) -> list[list[str]]:
    """The words of each line; the one thing that is not run as printed: 30 epochs are 1."""
    lines = [shlex.split(line) for line in block.splitlines() if line.startswith("nat-models ")]
    for words in lines:
        if "--epochs" in words:
            words[words.index("--epochs") + 1] = "1"
            words += SHORT
    return [words[1:] for words in lines]


def _run_here(block: str, is_bash: bool) -> None:
    if not is_bash:
        exec(compile(block, "page", "exec"), {"__name__": "page"})
        return
    for words in _commands(block):
        if "--config" in words:
            words += ["--no-pretrained", "--head-only-epochs", "0"]
        assert main(words) == 0, words


def test_every_page_is_known():
    assert set(PAGES) == {"README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))}


# In order: a later block reads what an earlier one wrote.
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.xdist_group(page), *[pytest.mark.slow] * (page in SLOW)])
        for page in PAGES
        if page not in LOCAL
    ],
)
def test_how_tos_run_as_printed(page, forks, desk):
    ran = 0
    for _, block in _blocks(page):
        if block.startswith("make "):
            continue
        runs = [dict(command=words) for words in _commands(block)] or [dict(code=block)]
        for run in runs:
            done = forks.run(**run)
            assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        ran += 1
    assert ran == PAGES[page]
    if page == "README.md":
        assert {"summary.csv", "curve.png", "best", "last"} <= {f.name for f in (desk / "output").iterdir()}
        assert (desk / "features.safetensors").is_file()


def _rows() -> list[tuple[str, str]]:
    """Of the table of those who come from elsewhere: what they used, and the code of the last column."""
    table = re.search(r"\| you used \|.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return [(used, code.strip("`")) for used, _, code in cells]


@pytest.mark.parametrize("used, code", _rows())
def test_who_comes_from_elsewhere_is_served(used, code, forks):
    done = forks.run(code=code)
    assert done.returncode == 0, f"{used}\n{done.stdout}{done.stderr}"


def test_every_kind_of_reader_has_a_row():
    assert len(_rows()) == 7


@pytest.mark.parametrize(("page", "whole"), [*((page, False) for page in LOCAL), *WHOLE])
def test_how_tos_without_published_weights_run_as_printed(page, whole, desk, monkeypatch, tmp_path):
    for name in ("images", "photo.jpg", "street", "pets"):
        (tmp_path / name).symlink_to(desk / name)
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(page)
    for language, block in blocks:
        if whole or not block.startswith(SLOW_BLOCKS):
            _run_here(block, language == "bash")
    assert len(blocks) == PAGES[page]


def test_the_two_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^make ([\w-]+)", "\n".join(block for _, block in _blocks("README.md")), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "weights/README.md", *PAGES])
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert missing == []


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
