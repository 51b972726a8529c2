"""Reading files: what is intact is not called damaged; what cannot be read says what it is; nothing is run."""

import argparse
import json
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn

from nat_models.checkpoints import CheckpointError, read_checkpoint
from nat_models.checkpoints.files import why_unreadable
from tests.checkpoints.conftest import load_file, random_state_dict, same_tensors, small_network


class Config:
    """Something of a user's own in a checkpoint; at module level, so that it can be pickled."""

    def __init__(self):
        self.depth = 3


class Container:
    def __init__(self, payload):
        self.payload = payload


def _refusal(path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_file(path)
    message = str(refused.value)
    assert len(message.splitlines()) <= 5 and str(path) in message
    return message


MORE = {
    "own class": (Config(), "tests.checkpoints.test_files.Config", [Config]),
    "path": (pathlib.PurePosixPath("a/b"), "PurePosixPath", [pathlib.PurePosixPath]),
    "module": (nn.GELU(), "torch.nn.modules.activation.GELU", [nn.GELU]),
    "two classes": (Container(Config()), "test_files.Co", [Container, Config]),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("what", MORE)
def test_a_file_with_more_than_tensors_says_what_and_loads_when_it_is_trusted(tmp_path, what, legacy):
    value, name, classes = MORE[what]
    state_dict, path = random_state_dict("original"), tmp_path / "run.pth"
    torch.save({"state_dict": state_dict, "extra": value}, path, _use_new_zipfile_serialization=not legacy)
    message = _refusal(path)
    first, second, third, _ = message.splitlines()
    assert first.startswith(f"{path} holds more than tensors: ") and name in first
    assert "torch.serialization.safe_globals([" in second and name in second
    assert "damaged" not in message and "elete" not in message
    with torch.serialization.safe_globals(classes):
        if what == "module" and legacy:  # stored with its source, which torch allows nobody
            assert "is a pickle that torch does not read without running code" in _refusal(path)
        else:
            assert same_tensors(load_file(path), state_dict)
    # And as the third line says.
    exec(third.replace("'weights.pth'", repr(str(tmp_path / "weights.pth"))), {"torch": torch})
    assert same_tensors(load_file(tmp_path / "weights.pth"), state_dict)


def test_all_classes_of_an_archive_are_named_those_of_everybody_last(tmp_path):
    more = {"a": Container(Config()), "b": pathlib.PurePosixPath("a"), "c": [dict, int], "d": nn.GELU()}
    torch.save(more, tmp_path / "run.pth")
    first = _refusal(tmp_path / "run.pth").splitlines()[0]
    for name in ("PurePosixPath", "test_files.Config", "test_files.Container", "GELU and 2 more."):
        assert name in first


def test_arguments_of_argparse_load_as_in_timm_and_what_the_caller_allowed_stays_allowed(tmp_path):
    state_dict, path = random_state_dict("original"), tmp_path / "run.pth"
    torch.save({"state_dict": state_dict, "args": argparse.Namespace(lr=1.0)}, path)
    before = set(torch.serialization.get_safe_globals())
    assert same_tensors(load_file(path), state_dict)
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_file(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    torch.save({"state_dict": state_dict, "args": argparse.Namespace(config=Config())}, path)
    assert "Namespace" not in _refusal(path)


def test_a_whole_model_loads_when_its_classes_are_trusted(tmp_path):
    model, path = small_network(), tmp_path / "model.pth"
    torch.save({"ema": model, "epoch": 3}, path)
    assert "nat_models.layers.NeighborhoodAttention2d" in _refusal(path) and ".state_dict()" in _refusal(path)
    names = (name.rpartition(".") for name in torch.serialization.get_unsafe_globals_in_checkpoint(path))
    with torch.serialization.safe_globals([getattr(sys.modules[module], name) for module, _, name in names]):
        assert same_tensors(load_file(path), model.state_dict())


@pytest.mark.parametrize("call", ["open", "system"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_run_code_are_refused(tmp_path, call, legacy):
    class Payload:
        def __reduce__(self):
            import os

            ran = str(tmp_path / "ran")
            return (open, (ran, "w")) if call == "open" else (os.system, (f"touch {ran}",))

    path = tmp_path / "evil.pth"
    torch.save({"model": Payload()}, path, _use_new_zipfile_serialization=not legacy)
    message = _refusal(path)
    assert call in message.splitlines()[0]
    # Nobody is told how to run it where torch itself would not.
    assert ("weights_only=False" in message) == (call == "open")
    assert not (tmp_path / "ran").exists()


def _cut(path, write, state_dict):
    write(state_dict, path)
    path.write_bytes(path.read_bytes()[:-1000])


UNREADABLE = {
    "cut.safetensors": (lambda path, d: _cut(path, lambda d, p: save_file(d, p), d), "is cut off.*Get it again"),
    "cut.pth": (lambda path, d: _cut(path, torch.save, d), "is cut off.*Get it again"),
    "cut_legacy.pth": (
        lambda path, d: _cut(path, lambda d, p: torch.save(d, p, _use_new_zipfile_serialization=False), d),
        "is cut off.*Get it again",
    ),
    "noise.pth": (lambda path, d: path.write_bytes(bytes(range(256)) * 9), "is cut off, damaged or no weights file"),
    "empty.pth": (lambda path, d: path.write_bytes(b""), "is empty"),
    "empty.safetensors": (lambda path, d: path.write_bytes(b""), "is empty"),
    "page.pth": (lambda path, d: path.write_text("\n<!doctype html><html>Not found</html>" * 9), "is a web page"),
    "page.safetensors": (lambda path, d: path.write_text("<html>Not found</html>" * 9), "is a web page"),
    "pointer.safetensors": (
        lambda path, d: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a pointer of git-lfs.*git lfs pull",
    ),
    "plain.pkl": (lambda path, d: path.write_bytes(pickle.dumps(d)), r"(?s)pickle that torch.*with pickle\.load\("),
    "plain2.pkl": (lambda path, d: path.write_bytes(pickle.dumps({"a": 1}, 2)), "is a pickle that torch does not read"),
    "protocol.pth": (
        lambda path, d: torch.save(d, path, pickle_protocol=4),
        r"(?s)is a pickle that torch.*with torch\.load\(\.\.\., weights_only=False",
    ),
    "arrays.npz": (lambda path, d: np.savez(path, a=np.zeros(3)), r"a zip archive, but none of torch.save: .*a\.npy"),
    "script.pt": (
        lambda path, d: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        "is a TorchScript archive.*\ntorch.save.*torch.jit.load",
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TorchScript", "ignore:.torch.jit")
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_file_of_weights_says_what_it_is(tmp_path, name):
    write, message = UNREADABLE[name]
    path = tmp_path / name
    write(path, random_state_dict("nat_models"))
    with pytest.raises(CheckpointError, match=message) as refused:
        load_file(path)
    assert str(path) in str(refused.value) and len(str(refused.value).splitlines()) <= 2
    # A user's own file is not to be deleted.
    assert "elete" not in str(refused.value)


def test_a_damaged_archive_is_not_taken_for_a_refused_one(tmp_path):
    path = tmp_path / "run.pth"
    torch.save({"state_dict": random_state_dict("original"), "extra": Config()}, path)
    path.write_bytes(path.read_bytes()[:-3000])
    assert "cannot be read: it is cut off" in _refusal(path)


def test_an_error_that_says_nothing_of_damage_is_passed_on_without_advice(tmp_path):
    path = tmp_path / "run.pth"
    torch.save({"a": torch.zeros(1)}, path)
    assert why_unreadable(path, RuntimeError("not enough memory\n...")) == (
        f"{path} cannot be read. (RuntimeError: not enough memory)"
    )


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "absent.index.json"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"nat_mini: there is no weights file .*{name}"):
        load_file(tmp_path / name)


def test_the_content_tells_the_format_and_not_the_name(tmp_path):
    state_dict = random_state_dict("nat_models")
    save_file(state_dict, tmp_path / "pytorch_model.bin")
    torch.save(state_dict, tmp_path / "model.safetensors")
    for path in tmp_path.iterdir():
        assert same_tensors(load_file(path), state_dict)


def test_shards_are_joined_by_their_index_and_one_alone_is_refused(tmp_path):
    state_dict = random_state_dict("nat_models")
    save_torch_state_dict(state_dict, tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    assert len(shards) > 1
    assert same_tensors(load_file(index), state_dict) and same_tensors(load_file(tmp_path), state_dict)
    assert f"is one of {len(shards)} files" in _refusal(shards[0])
    named = json.loads(index.read_text())
    named["weight_map"]["norm.extra"] = shards[0].name
    index.write_text(json.dumps(named))
    with pytest.raises(CheckpointError, match=r"names tensors that its files do not hold: norm\.extra\."):
        read_checkpoint(index)
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match=f"no weights file .*{shards[-1].name}"):
        load_file(index)


def test_a_folder_without_a_known_name_lists_what_it_holds(tmp_path):
    (tmp_path / "last.ckpt").touch()
    assert "name the file in it, found last.ckpt" in _refusal(tmp_path)
    (tmp_path / ".metadata").touch()
    assert "dcp_to_torch" in _refusal(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_loads_after_what_the_error_says(tmp_path):
    import torch.distributed.checkpoint as dcp

    state_dict, folder = random_state_dict("original"), tmp_path / "dcp"
    dcp.save({"model": state_dict, "epoch": 3}, checkpoint_id=str(folder))
    command = _refusal(folder).partition("python -m ")[2].split()
    subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert same_tensors(load_file(tmp_path / "weights.pth"), state_dict)


def test_a_zip_archive_names_its_members(tmp_path):
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        for i in range(6):
            archive.writestr(f"{i}.png", b"")
    assert "it holds 0.png, 1.png, 2.png, 3.png and 2 more." in _refusal(tmp_path / "run.zip")


def test_hyper_parameters_of_another_package_are_named_by_their_class(tmp_path, monkeypatch):
    # Lightning before 2.2 wrote them so; the package need not be installed to be named.
    module = types.ModuleType("lightning.fabric.utilities.data")
    AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})
    module.AttributeDict = AttributeDict
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        for parent in ("lightning", "lightning.fabric", "lightning.fabric.utilities"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        torch.save({"state_dict": {}, "hyper_parameters": AttributeDict(lr=1)}, tmp_path / "last.ckpt")
    assert "tensors: lightning.fabric.utilities.data.AttributeDict." in _refusal(tmp_path / "last.ckpt")
