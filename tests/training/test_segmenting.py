"""nat-models predict with a segmenter: label maps, overlays, areas, tiles."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from nat_models.cli import main
from nat_models.training.mask_sets import fitted
from nat_models.training.segmenters import Segmenter, load_segmenter, save_segmenter
from nat_models.training.segmenting import FACTORS, overlay_jpeg, segment, spans

TINY = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=3)
ABOUT = Segmenter(
    "nat_mini", TINY, 16, ["sky", "sea", "land"], [(0, 0, 255), (0, 99, 0), (250, 250, 0)], [0.5] * 3, [0.2] * 3
)


def _save(folder: Path, about: Segmenter) -> Path:
    network = about.make_network()
    with torch.no_grad():  # classes that differ from pixel to pixel
        network.decode_head.conv_seg.weight.normal_()
    folder.mkdir(parents=True)
    save_segmenter(network, folder, about)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run with a segmenter in best/."""
    _save(tmp_path / "run" / "best", ABOUT)
    return tmp_path / "run"


@pytest.fixture
def images(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (70, 90)), ("more/b.jpg", (96, 64))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(path)
    return tmp_path / "images"


def _image(height: int, width: int) -> torch.Tensor:
    """[3, H, W] of coarse spots of random colours."""
    values = np.random.default_rng(1).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return pil_to_tensor(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


def _pixels(image: torch.Tensor) -> torch.Tensor:
    return ((image / 255 - 0.5) / 0.2)[None]


def test_a_folder_of_images_becomes_label_maps_overlays_and_areas(run, images, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["predict", "--model", str(run), str(images), "--output", str(output)]) == 0
    assert f"look at {output}: masks/, overlays/ and areas.csv of 2 images" in capsys.readouterr().out
    files = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert files == {"areas.csv", "masks/a.png", "masks/more/b.png", "overlays/a.jpg", "overlays/more/b.jpg"}
    network, about = load_segmenter(run)
    rows = list(csv.DictReader((output / "areas.csv").open()))
    for number, name in enumerate(("a.png", "more/b.jpg")):
        image = Image.open(images / name)
        with torch.no_grad():
            expected = network(_pixels(pil_to_tensor(image)))[0].argmax(0).numpy()
        mask = Image.open(output / "masks" / Path(name).with_suffix(".png"))
        assert mask.mode == "P" and mask.getpalette()[:9] == [part for colour in about.colours for part in colour]
        assert (np.asarray(mask) == expected).mean() > 0.999  # of logits that are equal but for rounding any wins
        own = rows[3 * number : 3 * number + 3]
        assert [row["class"] for row in own] == about.classes
        assert {row["image"] for row in own} == {str(images / name)}
        assert [int(row["pixels"]) for row in own] == np.bincount(np.asarray(mask).ravel(), minlength=3).tolist()
        assert sum(float(row["percent"]) for row in own) == pytest.approx(100, abs=1e-3)
        overlay = Image.open(output / "overlays" / Path(name).with_suffix(".jpg"))
        assert overlay.width > image.width  # by the legend


def test_a_single_file_is_called_by_its_last_part(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "--model", "run", "images/more/b.jpg"]) == 0
    assert (tmp_path / "segmented" / "masks" / "b.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "2"], "--top-k is not for a segmenter"),
        (["--sort-into", "x"], "--sort-into is not for a segmenter"),
        (["--tile", "100"], "A tile must be a multiple of 32 px and at least 128, got 100."),
        (["--output", "images/masks"], "must not lie in what is read, images"),
        (["images/a.png", "copy/a.jpg"], "would both have the label map a.png: rename one."),
        (["broken.png"], "broken.png cannot be read as an image"),
    ],
)
def test_mistakes_are_one_line(flags, message, run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copy").mkdir()
    Image.open("images/a.png").save("copy/a.jpg")
    (tmp_path / "broken.png").write_bytes(b"no image")
    sources = [] if flags[0].endswith("g") else ["images"]
    assert main(["predict", "--model", "run", *sources, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("areas.csv*"))


def test_a_classifier_has_no_tiles(images, capsys):
    assert main(["predict", "--model", "nat_mini", "--no-pretrained", str(images), "--tile", "512"]) == 2
    assert "--tile is not for a classifier, as nat_mini is one." in capsys.readouterr().err


def test_arrays_of_any_number_of_bands_are_read_as_training_reads_them(tmp_path, capsys):
    about = replace(ABOUT, backbone_kwargs=dict(TINY, in_chans=6), mean=[0.5] * 6, std=[0.2] * 6)
    _save(tmp_path / "run", about)
    network, _ = load_segmenter(tmp_path / "run")
    (tmp_path / "scenes").mkdir()
    reflectances = np.random.default_rng(0).random((6, 4, 5))
    fine = F.interpolate(torch.from_numpy(reflectances)[None].float(), (64, 80), mode="bilinear")[0]
    for name, array in (
        ("float", fine.numpy()),
        ("uint16", (fine * 65535).round().numpy().astype(np.uint16)),
        ("uint8", (fine * 255).round().numpy().astype(np.uint8)),
    ):
        np.save(tmp_path / "scenes" / f"{name}.npy", array.transpose(1, 2, 0))
    argv = ["predict", "--model", str(tmp_path / "run"), str(tmp_path / "scenes"), "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    with torch.no_grad():
        expected = network((fine[None] - 0.5) / 0.2)[0].argmax(0).numpy()
    assert len(np.unique(expected)) > 1
    for name, least in (("float", 0.999), ("uint16", 0.999), ("uint8", 0.98)):
        assert (np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}.png")) == expected).mean() > least
        assert Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg").height >= 64
    np.save(tmp_path / "scenes" / "five.npy", np.zeros((64, 80, 5), np.uint8))
    assert main(argv) == 2
    assert "five.npy must be an array [H, W, 6], got [64, 80, 5]." in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    assert main(["predict", "--model", str(tmp_path / "run"), str(tmp_path / "photo.png")]) == 2
    assert "photo.png cannot be read as 6 bands: save such images as .npy, [H, W, C]." in capsys.readouterr().err


def test_a_classifier_reads_no_arrays(tmp_path, capsys):
    np.save(tmp_path / "scene.npy", np.zeros((64, 64, 3), np.uint8))
    assert main(["predict", "--model", "nat_mini", "--no-pretrained", str(tmp_path)]) == 2
    assert "1 .npy" in capsys.readouterr().err


def test_unreadable_images_are_skipped_on_request(run, images, tmp_path, capsys):
    (images / "broken.png").write_bytes(b"no image")
    output = tmp_path / "out"
    assert main(["predict", "--model", str(run), str(images), "--output", str(output), "--skip-unreadable"]) == 0
    assert "broken.png" in capsys.readouterr().err
    assert not (output / "masks" / "broken.png").exists() and (output / "masks" / "a.png").is_file()


@pytest.mark.parametrize(
    ("size", "sides", "expected"),
    [
        ((683, 512), (512, 2048), (683, 512)),
        ((300, 451), (512, 2048), (512, 770)),  # 769.7
        ((256, 2000), (512, 2048), (262, 2048)),  # the long side decides: 262.1
        ((300, 451), (None, None), (300, 451)),
        ((300, 451), (150, None), (150, 226)),  # 225.5
    ],
)
def test_sizes_of_a_test_are_the_papers(size, sides, expected):
    about = replace(ABOUT, short_side=sides[0], long_side=sides[1])
    assert fitted(size, about.scale) == expected
    assert fitted(size, about.scale, 0.5) == tuple(
        int(n * 0.5 * min((s / e for s, e in zip(sides, (min(size), max(size)), strict=True) if s), default=1) + 0.5)
        for n in size
    )


def test_the_image_is_resized_and_the_logits_back(run):
    network, about = load_segmenter(run)
    image, about = _image(96, 160), replace(about, short_side=64, long_side=256)
    with torch.no_grad():
        logits = network(F.interpolate(_pixels(image), (64, 107), mode="bilinear", antialias=False))
        expected = F.interpolate(logits, (96, 160), mode="bilinear")[0].argmax(0)
    found = segment(network, about, image)
    assert (found == expected.numpy()).mean() > 0.999
    assert len(np.unique(found)) > 1


def test_multi_scale_is_the_mean_of_twelve_passes(run):
    network, about = load_segmenter(run)
    image, total = _image(96, 160), 0
    with torch.no_grad():
        for factor in FACTORS:
            x = F.interpolate(_pixels(image), (int(96 * factor + 0.5), int(160 * factor + 0.5)), mode="bilinear")
            plain, mirrored = network(x), network(x.flip(3)).flip(3)
            total = total + sum(F.interpolate(y, (96, 160), mode="bilinear").softmax(1) for y in (plain, mirrored))
    found = segment(network, about, image, multi_scale=True)
    assert (found == total[0].argmax(0).numpy()).mean() > 0.999
    assert (found != segment(network, about, image)).any()


@pytest.mark.parametrize("length", [1, 127, 128, 129, 160, 500, 6000])
@pytest.mark.parametrize("tile", [128, 320, 1024, None])
def test_tiles_cover_an_axis_once(length, tile):
    found = spans(length, tile)
    assert [i for _, kept in found for i in range(kept.start, kept.stop)] == list(range(length))
    for place, kept in found:
        assert place.start % 32 == 0 and 0 <= place.start <= kept.start < kept.stop <= place.stop <= length
        assert tile is None or place.stop - place.start <= tile
        # Away from the image's border a pixel lies at least half an overlap inside its tile.
        margin = 0 if tile is None else max(tile // 128, 1) * 16
        assert place.start == 0 or kept.start - place.start >= margin
        assert place.stop == length or place.stop - kept.stop >= margin


def test_tiles_equal_the_whole_image_away_from_seams(run):
    network, about = load_segmenter(run)
    bottleneck = network.decode_head.bottleneck.conv.weight
    with torch.no_grad():  # without the pooling, over the whole map or the tile, what a pixel sees is bounded
        bottleneck[:, 128:] = 0
        image = _image(128, 1600)
        network.decode_head.conv_seg.bias -= network(_pixels(image)).mean((0, 2, 3))  # no class is everywhere
    whole, tiled = segment(network, about, image), segment(network, about, image, tile=1024)
    (first, kept), (second, _) = spans(1600, 1024)
    assert second.start < first.stop and len(np.unique(whole)) > 1
    far = np.abs(np.arange(1600) - kept.stop) > 256
    assert (whole == tiled)[:, far].mean() > 0.999
    assert (whole == tiled).mean() > 0.99
    shifted = np.roll(whole, 32, axis=1)
    assert (whole == shifted)[:, far].mean() < 0.95  # so the comparison can tell


def test_more_than_256_classes_are_refused():
    about = replace(ABOUT, classes=[str(i) for i in range(257)], colours=[(0, 0, 0)] * 257)
    with pytest.raises(Exception, match="A label map of 8 bits holds 256 classes, the segmenter has 257"):
        segment(None, about, _image(32, 32))


def test_what_is_not_finite_is_an_error(run):
    network, about = load_segmenter(run)
    with torch.no_grad():
        network.decode_head.conv_seg.bias[0] = float("nan")
    with pytest.raises(Exception, match=r"What the segmenter computes of x\.png in float32 is not finite"):
        segment(network, about, _image(64, 64), name="x.png")


def test_the_overlay_has_the_classes_colours_and_a_legend_of_those_that_occur():
    labels = np.zeros((200, 300), np.uint8)
    labels[:, 150:] = 2
    picture = Image.open(io.BytesIO(overlay_jpeg(torch.zeros(3, 200, 300, dtype=torch.uint8), labels, ABOUT)))
    left, right = picture.getpixel((50, 100)), picture.getpixel((250, 100))
    assert np.allclose(left, (0, 0, 127), atol=6) and np.allclose(right, (125, 125, 0), atol=6)
    legend = np.asarray(picture)[:, 302:].astype(int)
    near = {i: (np.abs(legend - colour).max(-1) < 40).sum() for i, colour in enumerate(ABOUT.colours)}
    assert near[0] > 50 and near[2] > 50 and near[1] == 0


@pytest.mark.slow
def test_tiles_of_24_megapixels_stay_under_3_gib(tmp_path):
    names = [str(i) for i in range(150)]
    about = replace(ABOUT, backbone_kwargs={}, channels=128, classes=names, colours=[(i, i, i) for i in range(150)])
    _save(tmp_path / "run", about)
    to_pil_image(_image(4000, 6000)).save(tmp_path / "large.png")
    argv = ["predict", "--model", "run", "large.png", "--tile", "512"]
    code = (
        "import json, resource, sys\nfrom nat_models.cli import main\n"
        f"code = main({argv})\n"
        "print(json.dumps([code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code, peak = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert peak * (1 if sys.platform == "darwin" else 1024) < 3 * 2**30
    assert Image.open(tmp_path / "segmented" / "masks" / "large.png").size == (6000, 4000)
