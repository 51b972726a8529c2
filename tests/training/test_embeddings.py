"""Promises of features in shards, and of what is made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nat_models.cli import main
from nat_models.errors import UserError
from nat_models.training import embeddings
from nat_models.training.embeddings import Extractor, extract, load_features
from nat_models.training.images import list_images
from nat_models.training.probing import knn, probe, search, split_features
from tests.training.conftest import fit, make_settings


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> str:
    output = tmp_path_factory.mktemp("model") / "o"
    fit(make_settings(data, output, epochs=1, warmup_epochs=0))
    return str(output)


def features(model: str, data: Path, output: Path, *flags) -> int:
    common = ["--model", model, "--data", data, "--output", output, "--num-workers", "0", "--batch-size", "8"]
    return main(["features", *map(str, [*common, *flags])])


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "f.safetensors"
    assert features(model, data, path) == 0
    return load_features(path)


@pytest.mark.parametrize("output", ["f.npz", "f.parquet", "f"])
def test_every_form_gives_the_same_features_back(model, data, whole, tmp_path, output):
    assert features(model, data, tmp_path / output, "--shard-size", "10") == 0
    found = load_features(tmp_path / output)
    np.testing.assert_array_equal(found.features, whole.features)
    assert (found.names, found.labels) == (whole.names, whole.labels)
    assert found.labels[:3] == ["blue"] * 3 and found.names[0].startswith("blue/")
    assert json.loads(found.metadata["preprocessing"]) == json.loads(whole.metadata["preprocessing"])


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "parquet"])
def test_shards_have_the_asked_size_and_form(model, data, tmp_path, suffix):
    assert features(model, data, tmp_path / "f", "--shard-size", "20", "--shard-format", suffix) == 0
    parts = sorted(path.name for path in (tmp_path / "f").glob("part-*"))
    assert parts == [f"part-000-{i:06}.{suffix}" for i in range(3)]
    assert [len(load_features(tmp_path / "f" / part).names) for part in parts] == [20, 20, 14]


def test_levels_and_dense_features_are_those_of_the_network(model, data, tmp_path):
    assert features(model, data, tmp_path / "l.npz", "--kind", "levels") == 0
    assert features(model, data, tmp_path / "d.npz", "--kind", "dense", "--level", "1", "--dtype", "float16") == 0
    levels, dense = load_features(tmp_path / "l.npz"), load_features(tmp_path / "d.npz")
    assert levels.features.shape == (54, 16 + 32 + 64 + 128)
    assert dense.features.shape == (54, 4, 4, 32) and dense.features.dtype == np.float16
    means = dense.features.astype(np.float32).mean(axis=(1, 2))
    np.testing.assert_allclose(means, levels.features[:, 16:48], atol=2e-3)  # float16


@pytest.mark.parametrize("died_at", [0, 1, 2, 3])
def test_an_extraction_that_died_goes_on_after_its_last_shard(model, data, whole, tmp_path, monkeypatch, died_at):
    class Killed(BaseException):
        pass

    write, written = embeddings._write, []

    def dying(path, *args):
        if len(written) == died_at:
            raise Killed
        written.append(path.name)
        write(path, *args)

    monkeypatch.setattr(embeddings, "_write", dying)
    with pytest.raises(Killed):
        features(model, data, tmp_path / "f", "--shard-size", "12")
    with pytest.raises(UserError, match=r"holds no finished features"):
        load_features(tmp_path / "f")
    again = []
    monkeypatch.setattr(embeddings, "_write", lambda path, *args: (again.append(path.name), write(path, *args)))
    assert features(model, data, tmp_path / "f", "--shard-size", "12") == 2  # it must be said
    assert features(model, data, tmp_path / "f", "--shard-size", "12", "--resume") == 0
    assert not set(written) & set(again) and len(written) + len(again) == 5
    np.testing.assert_allclose(load_features(tmp_path / "f").features, whole.features, atol=1e-5)  # other batches


@pytest.mark.parametrize(
    ("flags", "changed"),
    [(["--shard-size", "9"], "shard_size"), (["--kind", "levels"], "kind"), (["--dtype", "float16"], "dtype")],
)
def test_an_extraction_goes_on_as_it_began_or_not_at_all(model, data, tmp_path, capsys, flags, changed):
    assert features(model, data, tmp_path / "f") == 0
    assert features(model, data, tmp_path / "f", "--resume", *flags) == 2
    assert f"were begun otherwise; changed: {changed}" in capsys.readouterr().err


def test_two_processes_write_shards_of_their_own(model, data, whole, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "nat_models", "features"]
    flags = ["--model", model, "--data", data, "--output", tmp_path / "f", "--shard-size", "10", "--num-workers", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, *map(str, [*launch, *flags])], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert {path.name[:8] for path in (tmp_path / "f").glob("part-*")} == {"part-000", "part-001"}
    found = load_features(tmp_path / "f")
    assert found.names == whole.names
    np.testing.assert_allclose(found.features, whole.features, atol=1e-5)  # other batches


def test_labels_of_a_split_are_kept(model, data, tmp_path):
    assert features(model, data, tmp_path / "f.npz", "--split", "val", "--val-fraction", "0.25") == 0
    found = load_features(tmp_path / "f.npz")
    assert found.labels == ["blue"] * 4 + ["green"] * 4 + ["red"] * 4


def test_features_of_noise_are_worth_nothing_and_of_classes_everything(whole):
    train, test = split_features(whole)
    rng = np.random.default_rng(0)
    noise = [type(p)(rng.normal(size=p.features.shape), p.names, p.labels, p.metadata) for p in (train, test)]
    for method in (knn, probe):
        assert method(train, test)["top1"] > 90
        assert method(*noise)["top1"] < 80
    assert set(train.names) & set(test.names) == set()


@pytest.mark.parametrize("command", ["knn", "probe"])
def test_baselines_stand_beside_the_features(model, data, tmp_path, command, capsys):
    assert features(model, data, tmp_path / "f.safetensors") == 0
    flags = ["--train", tmp_path / "f.safetensors", "--baselines", data, "--output", tmp_path / "r.json"]
    assert main([command, *map(str, flags)]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [row["features"] for row in rows] == ["features", "raw pixels", "random weights"]
    assert "raw pixels" in capsys.readouterr().out


def test_features_of_different_models_are_not_compared(model, data, tmp_path, capsys):
    assert features(model, data, tmp_path / "a.npz") == 0
    assert features(model, data, tmp_path / "b.npz", "--kind", "levels") == 0
    assert main(["knn", "--train", str(tmp_path / "a.npz"), "--test", str(tmp_path / "b.npz")]) == 2
    assert "The features are of different kind: pooled and levels" in capsys.readouterr().err
    (tmp_path / "c.npz").write_bytes(b"")
    assert main(["knn", "--train", str(tmp_path / "c.npz")]) == 2
    assert "cannot be read as features" in capsys.readouterr().err


def test_an_image_is_nearest_to_itself(model, data, tmp_path, capsys):
    assert features(model, data, tmp_path / "f.npz") == 0
    capsys.readouterr()
    query = data / "red" / "7.png"
    assert main(["search", "--features", str(tmp_path / "f.npz"), "--query", str(query), "--top", "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    nearest = json.loads(line)["nearest"]
    assert nearest[0] == {"image": "red/7.png", "label": "red", "similarity": 1.0} and len(nearest) == 2


def test_search_is_by_angle(whole):
    found = search(whole, 5 * whole.features[:2], top=1)
    assert [row[0][0] for row in found] == whole.names[:2]


def test_pictures_are_drawn(model, data, tmp_path):
    assert features(model, data, tmp_path / "f.npz") == 0
    map_ = ["--kind", "map", "--features", tmp_path / "f.npz", "--method", "pca", "--output", tmp_path / "m.png"]
    images = [
        "--kind",
        "components",
        "--images",
        data / "red" / "1.png",
        "--level",
        "0",
        "--output",
        tmp_path / "c.png",
    ]
    for flags in (map_, [*images, "--output", tmp_path / "c.png"]):
        assert main(["picture", "--model", model, *map(str, flags)]) == 0
    for name in ("m.png", "c.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_an_extractor_is_pickled_as_its_arguments(model, data, whole):
    import pickle

    extractor = Extractor(model)
    extractor.model  # noqa: B018
    copy = pickle.loads(pickle.dumps(extractor))
    assert len(pickle.dumps(extractor)) < 2000
    images = list_images(data)[:3]
    found = copy({"path": np.array([image.path for image in images])})["features"]
    np.testing.assert_allclose(found, whole.features[:3], atol=1e-5)


@pytest.mark.slow
def test_ray_data_extracts_with_two_actors(model, data, whole):
    ray = pytest.importorskip("ray")
    # The two actors keep a processor each, and reading needs one too.
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        files = ray.data.read_binary_files([image.path for image in list_images(data)], include_paths=True)
        mapped = files.map_batches(Extractor, fn_constructor_args=[model], batch_size=8, concurrency=2, num_cpus=1)
        rows = sorted(mapped.take_all(), key=lambda row: row["path"])
    finally:
        ray.shutdown()
    found = np.stack([row["features"] for row in rows])
    names = ["/".join(Path(row["path"]).parts[-2:]) for row in rows]
    assert names == whole.names
    np.testing.assert_allclose(found, whole.features, atol=1e-5)


def test_extract_refuses_a_level_that_is_not_there(model, data, tmp_path):
    with pytest.raises(UserError, match="level must lie between 0 and 3, got 4"):
        extract(Extractor(model, kind="dense", level=4), list_images(data), tmp_path / "f.npz")
    assert not list(tmp_path.iterdir())
    assert torch.is_inference_mode_enabled() is False
