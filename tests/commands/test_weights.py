"""nat-models weights: what is listed, and what of it counts as cached."""

import json

import pytest
from huggingface_hub import constants

import nat_models
from nat_models.cli import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache with nat-tiny's weights in it, in the Hub's layout."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--shi-labs--nat-tiny-in1k-224"
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT / "pytorch_model.bin").write_bytes(b"weights")
    return repo


def test_the_table_has_a_row_for_each_checkpoint_and_tells_the_cached_one(cache, capsys):
    assert main(["weights"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["weights", "parameters", "size", "top-1", "licence", "cached", "where"]
    assert [row.split()[0] for row in rows] == [weights.name for weights in nat_models.list_weights()]
    (tiny,) = [row.split() for row in rows if row.startswith("nat_tiny.shi_in1k")]
    assert " ".join(tiny[1:]) == "27.9 M 112 MB 83.2 % mit yes shi-labs/nat-tiny-in1k-224"
    assert [row.split()[0] for row in rows if " yes " in row] == ["nat_tiny.shi_in1k"]


def test_json_names_the_cached_file_and_a_pattern_chooses(cache, capsys):
    assert main(["weights", "nat_[ts]*", "--json"]) == 0
    listed = {entry["architecture"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(listed) == {"nat_tiny", "nat_small"}
    assert listed["nat_tiny"]["tag"] == "shi_in1k"
    assert listed["nat_tiny"]["cached"] == str(cache / "snapshots" / COMMIT / "pytorch_model.bin")
    assert listed["nat_small"]["cached"] is None
    assert listed["nat_tiny"]["megabytes"] == 111.6


@pytest.mark.parametrize("pattern", ["nat_tiny", "nat_tiny.shi_in1k", "nat_t*"])
def test_an_architecture_names_its_weights(pattern):
    assert [weights.name for weights in nat_models.list_weights(pattern)] == ["nat_tiny.shi_in1k"]


def test_a_pattern_that_nothing_matches_is_one_line(capsys):
    assert main(["weights", "nat_tin"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Unknown weights 'nat_tin', near to nat_tiny") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("pins", "cached"),
    [
        ({}, True),
        (dict(revision=COMMIT), True),
        (dict(revision="f" * 40), False),
        (dict(file="weights.bin", sha256="0" * 64), False),  # whose file is asked for by its name
        (dict(sha256="0" * 64), True),
    ],
)
def test_what_is_pinned_counts_as_cached_where_that_revision_and_file_are(cache, pins, cached):
    (weights,) = nat_models.list_weights("nat_tiny")
    assert (weights._replace(**pins).cached() is not None) is cached


def test_weights_at_an_address_are_found_in_the_cache_of_pytorch(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (weights,) = nat_models.list_weights("vitrpb_small")
    assert weights.repo is None and weights.url.endswith(weights.file) and weights.cached() is None
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / weights.file).touch()
    assert weights.cached() == tmp_path / "hub" / "checkpoints" / weights.file
