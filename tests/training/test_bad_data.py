"""Data as people have them by mistake: one line and exit code 2, or the skip that is documented; never a wrong list."""

import io
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from nat_models.cli import main

PIXEL = io.BytesIO()
Image.new("RGB", (8, 8), (9, 9, 9)).save(PIXEL, "PNG")
PIXEL = PIXEL.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(root: Path, *names: str, content: bytes = PIXEL) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def tree(root: Path) -> None:
    put(root, *(f"{c}/{i}.png" for c in "ab" for i in range(4)))


def table(root: Path, text: str, name: str = "t.csv") -> str:
    tree(root)
    (root / name).write_text(text)
    return name


def lines(header: str, *rows: str) -> str:
    return "\n".join([header, *rows, ""])


GOOD = [f"{c}/{i}.png,{c}" for c in "ab" for i in range(4)]


def shard(root: Path, members: dict[str, bytes], name: str = "s.tar", mode: str = "w") -> str:
    with tarfile.open(root / name, mode) as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return name


def _empty_class(root):
    tree(root)
    put(root, "c/1.txt", "c/2.txt")


def _webp_unreadable(root):
    tree(root)
    put(root, "c/1.heic")


def _strangers(root):
    put(root, "train/a/1.png", "train/b/1.png", "val/c/1.png")


def _two_vals(root):
    put(root, "train/a/1.png", "train/b/1.png", "val/a/1.png", "validation/a/1.png")


def _run(root):
    tree(root)
    put(root, "config.yaml", ".lock", content=b"")


def _torn(root, count=1):
    tree(root)
    put(root, *(f"a/torn{i}.png" for i in range(count)), content=b"\x89PNG\r\n\x1a\n")


def _named(text, name="t.csv"):
    return lambda root: table(root, text, name)


CASES = {
    "no folder": (lambda root: "nowhere", "There is no folder"),
    "an empty folder": (lambda root: None, "There are no images in"),
    "no images": (lambda root: put(root, "a/1.txt"), "There are no images in .*, but 1 .txt"),
    "one class": (lambda root: put(root, "a/1.png", "a/2.png"), r"must hold at least 2 classes .* \['a'\]"),
    "images at the top": (lambda root: put(root, "1.png", "2.png"), "Images must lie in .*/CLASS/.*found .*1.png"),
    "images too deep": (lambda root: put(root, "x/a/1.png", "x/b/1.png"), "Images must lie in"),
    "images at the top of train": (lambda root: put(root, "train/1.png", "val/a/1.png"), "Images must lie in"),
    "an empty class": (_empty_class, "class folder .*/c holds no images, but 2 .txt"),
    "a class of a format that is not read": (_webp_unreadable, r"/c holds no images, but 1 .heic \(which Pillow reads"),
    "a class that train lacks": (_strangers, "Classes in .*, val that the training part lacks: c"),
    "val and validation": (_two_vals, r"holds both val/ and validation/: keep one"),
    "nothing to validate on": (lambda root: put(root, "a/1.png", "b/1.png"), "an image to validate on"),
    "a run's output": (_run, "is a run's output, not data"),
    "a torn image": (_torn, r"torn0.png cannot be read as an image"),
    "twelve torn images": (lambda root: _torn(root, 12), r"torn0.png cannot .*\(12 of 20 images; --skip-unreadable"),
    "an empty file": (lambda root: (tree(root), put(root, "a/e.png", content=b""))[0], "e.png cannot be read"),
    "text called an image": (
        lambda root: (tree(root), put(root, "a/e.jpg", content=b"<html>"))[0],
        "e.jpg cannot be read as an image: cannot identify",
    ),
    "a photo": (lambda root: (put(root, "x.png"), "x.png")[1], "neither a folder nor a table"),
    "an archive": (lambda root: (put(root, "x.zip"), "x.zip")[1], "x.zip is compressed: unpack it"),
    "a compressed shard": (lambda root: shard(root, {"1.png": PIXEL}, "x.tar.gz", "w:gz"), "is compressed: unpack"),
    "a table that is not there": (lambda root: "t.csv", "There is no folder"),
    "an empty table": (_named(""), "has no rows"),
    "a table without images": (_named(lines("photo,label", "a/0.png,a")), "none of the usual columns for the image"),
    "a table without labels": (_named(lines("path,lable", "a/0.png,a")), "none of the usual columns for the label"),
    "missing images": (_named(lines("path,label", *GOOD, "a/9.png,a")), "1 images of .* are missing: .*a/9.png"),
    "an image twice": (_named(lines("path,label", *GOOD, GOOD[0])), "1 images of .* are listed twice: a/0.png"),
    "an empty label": (_named(lines("path,label", *GOOD[1:], "a/0.png,")), "1 images have no label: a/0.png"),
    "an empty path": (_named(lines("path,label", *GOOD, ",a")), "1 rows of .* name no image: line 10"),
    "an unknown split": (
        _named(lines("path,label,split", *(f"{row},trian" for row in GOOD))),
        "words in the split column of .* are none of train, val, test: 'trian'",
    ),
    "a row that is too long": (_named(lines("path,label", *GOOD, "a/0.png,a,b")), "rows of .* are too long: line 10"),
    "broken JSON": (_named('{"path": "a/0.png", "label"', "t.jsonl"), "cannot be read as a table"),
    "no parquet": (_named("path,label", "t.parquet"), "cannot be read as a dataset"),
    "a shard without labels": (lambda root: shard(root, {"1.png": PIXEL}), "1 images have no .cls"),
    "a shard of text": (
        lambda root: (put(root, "s.tar", content=b"text" * 500), "s.tar")[1],
        "cannot be read as a shard",
    ),
    "a shard of nothing": (lambda root: shard(root, {"1.txt": b"x"}), "must hold at least 2 classes"),
    "a pattern of no shards": (lambda root: "s-{000..001}.tar", "2 shards are missing"),
}


def start(root: Path, source: str, *flags: str) -> int:
    return main(
        ["train", "--data", str(root / source), "--output", str(root.parent / "o"), "--batch-size", "2", *flags]
    )


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_in_the_data_is_one_line_and_nothing_is_written(tmp_path, capsys, case):
    make, message = CASES[case]
    (root := tmp_path / "data").mkdir()
    source = make(root)
    assert start(root, source if isinstance(source, str) else "") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-column", "photo"], "has no column 'photo' (--image-column), only path, label"),
        (["--val-fraction", "1"], "val_fraction must lie between 0 and 1"),
        (["--class-weights", "c=2"], "Unknown class in class_weights 'c'"),
        (["--metric", "top2"], "metric must be one of val_loss, top1"),
        (["--freeze", "level9"], "freeze must be backbone, one of stem, level0"),
        (["--trackers", "tensorbord"], "trackers must be auto, none, or names"),
        (["--trackers", "wandb"], "The tracker wandb is not installed: pip install wandb"),
        (["--global-batch-size", "3"], "global_batch_size must be a multiple of batch_size x processes, 2, got 3"),
        (["--extend-epochs", "3"], "--extend-epochs and --accept-versions go with --resume"),
        (["--verify", "all"], "verify must be none, headers or full"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(tmp_path, capsys, flags, message):
    (root := tmp_path / "data").mkdir()
    assert start(root, table(root, lines("path,label", *GOOD)), *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_what_cannot_be_read_is_left_out_and_counted_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "nat_models.commands.train.train", lambda settings, task, resume: print(*task.notes, task.sizes)
    )
    (root := tmp_path / "data").mkdir()
    _torn(root, 2)
    assert start(root, "", "--skip-unreadable") == 2
    assert "2 of 10 images cannot be read, more than unreadable_limit, 1.00%" in capsys.readouterr().err
    assert start(root, "", "--skip-unreadable", "--unreadable-limit", "0.2") == 0
    out = capsys.readouterr().out
    assert "left out: 2 of 10 images, which cannot be read, such as" in out
    assert out.endswith("(6, 2)\n")


def test_what_was_passed_over_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nat_models.commands.train.train", lambda settings, task, resume: print(*task.notes))
    (root := tmp_path / "data").mkdir()
    tree(root)
    put(root, "a/notes.txt", "__MACOSX/a/1.png", "A/1.png")
    assert start(root, "") == 0
    out = capsys.readouterr().out
    assert f"passed over in {root}: 1 .txt, 1 folder __MACOSX" in out
    assert "classes that differ in capitals or blanks only: ['A', 'a']" in out
    shutil.rmtree(root)
