"""Reading files of weights without running code from them, and saying why one cannot be read."""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError, UserError

# What transformers, accelerate and timm write into a folder; an index names the files that share the tensors.
_IN_FOLDER = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_LISTED = 4
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # after the protocol, of a file as torch.save wrote them before 1.6
_COMMON = {"builtins", "collections", "typing", "_codecs"}  # what a class of somebody else's drags along is named last


def read_checkpoint(path: str | Path) -> object:
    """Everything a file of weights holds: tensors for a safetensors file, what was saved for one of torch.save.

    Classes that torch does not know are refused unless `torch.serialization.safe_globals` names them.

    Args:
        path: A file, told by its content and not by its name; the index of several files; or a folder with one of the
            names that transformers and timm use.

    Raises:
        CheckpointError: It cannot be read; the message says what it is instead and what to do.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    try:
        if path.name.endswith(".index.json"):
            return _read_shards(path)
        if (shard := re.search(r"-(\d+)-of-(\d+)\.\w+$", path.name)) and int(shard[2]) > 1:
            raise CheckpointError(f"{path} is one of {int(shard[2])} files that share the weights: pass their index.")
        return _read_file(path)
    except (OSError, MemoryError, CheckpointError):
        raise
    except Exception as e:  # damaged bytes end in errors of any kind
        raise CheckpointError(why_unreadable(path, e)) from e


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_config(path: Path) -> dict:
    """What a config.json beside weights holds; nothing where it holds something else than keys and values.

    Raises:
        UserError: It cannot be read.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    return config if isinstance(config, dict) else {}


def holds_weights(folder: str | Path) -> bool:
    """Whether read_checkpoint finds weights in a folder."""
    return any((Path(folder) / name).is_file() for name in _IN_FOLDER)


def _file_in(folder: Path) -> Path:
    if holds_weights(folder):
        return next(folder / name for name in _IN_FOLDER if (folder / name).is_file())
    if (folder / ".metadata").is_file():
        raise CheckpointError(
            f"{folder} is a distributed checkpoint; make one file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
        )
    found = _some(sorted(path.name for path in folder.iterdir()))
    raise CheckpointError(f"{folder} is a folder without {_IN_FOLDER[0]}: name the file in it, found {found}.")


def _read_file(path: Path) -> object:
    # timm's train.py writes its arguments beside the weights. Leaving safe_globals removes what it was given, which
    # must not be what the caller allowed.
    known = {argparse.Namespace} - set(torch.serialization.get_safe_globals())
    with path.open("rb") as file, torch.serialization.safe_globals(list(known)):
        if file.read(9)[8:] == b"{":  # safetensors: eight bytes of length, then JSON
            return load_file(path)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)  # of a path, newer torch reads the name too


def _read_shards(index: Path) -> dict[str, Tensor]:
    files = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for name in sorted(set(files.values())):
        tensors |= _read_file(index.parent / name)
    if absent := sorted(files.keys() - tensors.keys()):
        raise CheckpointError(f"{index} names tensors that its files do not hold: {_some(absent)}.")
    return tensors


def why_unreadable(path: Path, error: Exception, advice: str = "Get it again from where it came.") -> str:
    """Says what a file is that reading it raised `error`, and what to do; `advice` is for one that was whole once."""
    with path.open("rb") as file:
        head = file.read(512)
    cause = error.__cause__ or error  # timm puts a RuntimeError around a refused pickle
    text, refused = str(cause), isinstance(cause, pickle.UnpicklingError)
    if not head:
        return f"{path} cannot be read: it is empty. {advice}"
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of git-lfs and not the weights: run `git lfs pull` in its folder."
    if head.lstrip().startswith(b"<"):
        return f"{path} is a web page and not weights: a server answered with it. {advice}"
    if "TorchScript" in text:
        return (
            f"{path} is a TorchScript archive, code and weights in one. Take its weights:\n"
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        )
    load = "torch.load(..., weights_only=False)" if head[2:].startswith(_MAGIC) else "pickle.load(...)"
    is_pickle = head.startswith(b"\x80")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        is_pickle, load = any(name.endswith("data.pkl") for name in members), "torch.load(..., weights_only=False)"
        if not is_pickle:
            return f"{path} is a zip archive, but none of torch.save: it holds {_some(members)}."
    if refused and (classes := _refused_classes(path, text)):
        return _holds_more(path, classes, text)
    if is_pickle and (refused or "magic number" in text):
        return (
            f"{path} is a pickle that torch does not read without running code from it ({first_line(error)}).\n"
            f"If you trust it, load it with {load} and save its tensors alone: torch.save({{...}}, 'weights.pth')"
        )
    if isinstance(error, RuntimeError) and not re.search(r"PytorchStreamReader|EOF|weights_only", text):
        return f"{path} cannot be read. ({first_line(error)})"
    return (
        f"{path} cannot be read: it is cut off, damaged or no weights file. Expected a safetensors file or a "
        f"torch.save archive of tensors. {advice} ({first_line(error)})"
    )


def _refused_classes(path: Path, text: str) -> list[str]:
    """The classes and functions in a file of torch.save that torch does not load."""
    classes = {name for names in re.findall(r"GLOBAL (\S+)|<class '(\w+\.[\w.]+)'>", text) for name in names if name}
    # Only of a zip archive; of an older file the one that was met first is known.
    with suppress(ValueError, RuntimeError, pickle.UnpicklingError):
        classes.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return sorted(classes - {"argparse.Namespace"}, key=lambda name: (name.split(".")[0] in _COMMON, name))


def _holds_more(path: Path, classes: list[str], text: str) -> str:
    if blocked := re.search(r"GLOBAL (\S+) whose module \S+ is blocked", text):
        return f"{path} calls {blocked[1]}, which torch runs for no file of weights. Use it only if you wrote it."
    allowed = ", ".join(classes[:2]) + (", ..." if len(classes) > 2 else "")
    return (
        f"{path} holds more than tensors: {_some(classes)}. No code from a file is run, so it was not loaded.\n"
        f"If you trust it, load it within torch.serialization.safe_globals([{allowed}]), or save its weights alone:\n"
        f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], 'weights.pth')\n"
        "(their entry may have another name; of a whole model, save .state_dict())"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "nothing") + more


def first_line(error: BaseException) -> str:
    """The error in a line. torch's texts on pickles are long; the reason stands after "WeightsUnpickler error"."""
    error = error.__cause__ or error
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason[:200]}"
