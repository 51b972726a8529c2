"""Promises of data that are no folders per class: tables, saved datasets, shards; and of what names the classes."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nat_models.errors import UserError
from nat_models.training.decoding import decode
from nat_models.training.splits import find_images, read_data, read_part
from nat_models.training.tables import Columns
from tests.training.conftest import COLOURS, fit, make_settings

PATHS = [f"{name}/{i}.png" for name in COLOURS for i in range(18)]


@pytest.fixture
def desk(data, tmp_path) -> Path:
    for name in COLOURS:
        (tmp_path / name).symlink_to(data / name)
    return tmp_path


def write(desk: Path, text: str, name: str = "t.csv") -> Path:
    (desk / name).write_text(text)
    return desk / name


def mean_colour(image) -> np.ndarray:
    return np.asarray(decode(image, 3)).mean(axis=(0, 1))


def assert_colours(data) -> None:
    """Every image has the colour that its target names, in every part."""
    for part in data.parts.values():
        for image, target in zip(part.images, part.targets, strict=True):
            assert np.abs(mean_colour(image) - COLOURS[data.names[target]]).max() < 25


def test_a_csv_with_splits(desk):
    rows = [f"{path},{path.split('/')[0]},{'validation' if i % 6 == 0 else 'train'}" for i, path in enumerate(PATHS)]
    data = read_data(write(desk, "\n".join(["file_name,label,split", *rows])))
    assert data.names == ["blue", "green", "red"]
    assert {part: len(x) for part, x in data.parts.items()} == {"train": 45, "val": 9}
    assert_colours(data)


@pytest.mark.parametrize("separator", ["\t", ";"])
def test_other_separators_and_a_byte_order_mark(desk, separator):
    rows = [f"{path}{separator}{path.split('/')[0]}" for path in PATHS]
    name = "t.tsv" if separator == "\t" else "t.csv"
    data = read_data(write(desk, "\ufeff" + "\n".join([f"path{separator}label", *rows]), name), val_fraction=0.25)
    assert len(data.parts["val"]) == 12
    assert_colours(data)


def test_columns_of_other_names(desk):
    rows = [f"{path},{path.split('/')[0]},x" for path in PATHS]
    table = write(desk, "\n".join(["photo,colour,label", *rows]))
    assert_colours(read_data(table, columns=Columns("photo", "colour")))


def test_json_lines_and_whole_numbers_of_two_spellings(desk):
    rows = [json.dumps({"path": p, "label": 1 if p[0] == "r" else "2.0" if p[0] == "g" else "10"}) for p in PATHS]
    data = read_data(write(desk, "\n".join(rows), "t.jsonl"))
    assert data.names == ["1", "2", "10"]


def test_several_labels_per_image_are_learnt(desk):
    rows = [f"{p},{'warm' if p[0] == 'r' else 'cold;wet' if p[0] == 'b' else ''}" for p in PATHS]
    table = write(desk, "\n".join(["path,labels", *rows]))
    data = read_data(table)
    assert data.multi_label and data.names == ["cold", "warm", "wet"]
    assert {tuple(sorted(target)) for target in data.parts["train"].targets} == {(), (0, 2), (1,)}
    rows = fit(make_settings(table, desk / "o", epochs=8, smoothing=0.0))
    assert rows[-1]["map"] > 90 and set(rows[0]) >= {"val_loss", "map", "macro_f1", "micro_f1", "exact"}
    config = json.loads((desk / "o" / "best" / "config.json").read_text())
    assert config["label_names"] == data.names


def test_a_parquet_of_paths_and_one_of_images(data, desk):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    labels = [path.split("/")[0] for path in PATHS]
    parquet.write_table(pyarrow.table(dict(path=PATHS, label=labels)), desk / "t.parquet")
    assert_colours(read_data(desk / "t.parquet"))
    content = [dict(bytes=(data / path).read_bytes(), path=path) for path in PATHS]
    (desk / "hub" / "data").mkdir(parents=True)
    for part, rows in (("train", slice(0, 54, 2)), ("validation", slice(1, 54, 2))):
        table = pyarrow.table(dict(image=content[rows], label=labels[rows]))
        parquet.write_table(table, desk / "hub" / "data" / f"{part}-00000-of-00001.parquet")
    found = read_data(desk / "hub")
    assert {part: len(x) for part, x in found.parts.items()} == {"train": 27, "val": 27}
    assert_colours(found)


def test_a_dataset_that_hugging_face_saved_keeps_its_order_of_classes(data, tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["red", "green", "blue"]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    rows = dict(image=[str(data / p) for p in PATHS], label=[names.index(p.split("/")[0]) for p in PATHS])
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one")
    whole.train_test_split(0.25, seed=0).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        found = read_data(tmp_path / name)
        assert found.names == names
        assert sum(map(len, found.parts.values())) == 54
        assert_colours(found)
    assert len(read_data(tmp_path / "two").parts["val"]) == 14


def shard(path: Path, data: Path, names: list[str], label) -> None:
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            suffix, text = label(name)
            for member, content in ((f"{i:05}.png", (data / name).read_bytes()), (f"{i:05}{suffix}", text)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_shards_of_webdataset_with_names_numbers_and_json(data, tmp_path):
    colour = lambda name: name.split("/")[0]  # noqa: E731
    shard(tmp_path / "train-000.tar", data, PATHS[:20], lambda n: (".cls", colour(n).encode()))
    record = lambda name: json.dumps({"label": colour(name)}).encode()  # noqa: E731
    shard(tmp_path / "train-001.tar", data, PATHS[20:44], lambda n: (".json", record(n)))
    shard(tmp_path / "val-000.tar", data, PATHS[40:], lambda n: (".cls", colour(n).encode()))
    found = read_data(tmp_path)
    assert {part: len(x) for part, x in found.parts.items()} == {"train": 44, "val": 14}
    assert_colours(found)
    pattern = read_data(f"{tmp_path}/train-{{000..001}}.tar")
    assert len(pattern.parts["train"]) + len(pattern.parts["val"]) == 44
    names = ["green", "blue", "red"]
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "classes.txt").write_text("\n".join(names))
    shard(tmp_path / "n" / "s.tar", data, PATHS, lambda n: (".cls", str(names.index(colour(n))).encode()))
    numbered = read_data(tmp_path / "n")
    assert numbered.names == names
    assert_colours(numbered)


@pytest.mark.parametrize("word", ["val", "valid", "validation", "test"])
def test_folders_of_parts_by_their_usual_names(data, tmp_path, word):
    shutil.copytree(data, tmp_path / "train")
    shutil.copytree(data / "red", tmp_path / word / "red")
    found = read_data(tmp_path)
    assert {part: len(x) for part, x in found.parts.items()} == {"train": 54, "val": 18}
    assert any("test images" in note for note in found.notes) is (word == "test")


def test_train_alone_is_split_like_one_tree(data, tmp_path):
    (tmp_path / "train").symlink_to(data)
    alone, tree = read_data(tmp_path), read_data(data)
    targets = [x.parts["val"].targets for x in (alone, tree)]
    assert targets[0] == targets[1]
    names = [image.name for image in tree.parts["val"].images]
    assert [image.name.removeprefix("train/") for image in alone.parts["val"].images] == names


def test_a_model_s_order_of_classes_is_kept_and_strangers_are_refused(data):
    found = read_data(data, names=["red", "violet", "blue", "green"])
    assert_colours(found)
    with pytest.raises(UserError, match="lacks: blue"):
        read_data(data, names=["red", "green"])


def test_a_part_of_one_tree_is_all_or_what_a_run_held_out(data):
    names = ["blue", "green", "red"]
    assert len(read_part(data, names)[0]) == 54
    held_out, _, _ = read_part(data, names, split="val", val_fraction=0.25)
    assert held_out.images == read_data(data, val_fraction=0.25).parts["val"].images


def test_the_digest_knows_names_sizes_labels_and_parts_but_not_places(data, tmp_path):
    shutil.copytree(data, tmp_path / "copy")
    digest = read_data(data).digest()
    assert read_data(tmp_path / "copy").digest() == digest
    assert read_data(data, seed=1).digest() != digest
    Image.new("RGB", (9, 9)).save(tmp_path / "copy" / "red" / "0.png")
    assert read_data(tmp_path / "copy").digest() != digest
    (tmp_path / "copy" / "red").rename(tmp_path / "copy" / "rose")
    assert read_data(tmp_path / "copy").digest() != digest


def test_images_are_found_in_files_folders_and_tables_each_once(data, desk):
    write(desk, "path\n" + "\n".join(PATHS[:3]))
    sources = [desk / "red" / "1.png", desk / "red" / "1.png", desk / "green", desk / "t.csv"]
    found = find_images(sources)
    assert len(found) == 1 + 18 + 3 and len(set(found)) == len(found)
    with pytest.raises(UserError, match="There is no folder"):
        find_images([desk / "nothing"])


def test_a_class_renamed_or_an_image_more_is_refused_by_resume(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    settings = make_settings(tmp_path / "data", tmp_path / "o", epochs=1, warmup_epochs=0)
    fit(settings)
    shutil.copy(data / "red" / "0.png", tmp_path / "data" / "red" / "more.png")
    with pytest.raises(UserError, match="The images must stay those"):
        fit(settings, resume=True)
    (tmp_path / "data" / "red" / "more.png").unlink()
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "azure")
    with pytest.raises(UserError, match=r"The classes must stay .* gone: \['red'\], new: \['azure'\]"):
        fit(settings, resume=True)
