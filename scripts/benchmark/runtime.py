"""Networks in ONNX Runtime and OpenVINO beside eager PyTorch: one exporter writes them all, with a dynamic batch."""

import argparse
import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

from nat_models import NeighborhoodAttention2d
from nat_models.export import write_onnx
from nat_models.onnx_operator import make_session
from nat_models.quantization import quantize_onnx

from .measure import Call, interleaved
from .plots import short
from .published import SWIN_TINY, TOP1

SIZE = 224  # px


class Form(NamedTuple):
    """A way to run a network.

    Attributes:
        package: What it needs installed; None for PyTorch itself.
        write: Makes its file of a network and an example; forms of one writer share the file.
        load: Makes of the file, or without a writer of the network, what runs one array or tensor [B, C, H, W].
        dtype: Of the computation; int8 has float32 around it.
    """

    package: str | None
    write: Callable[[nn.Module, Tensor, Path], None] | None
    load: Callable[[Path | nn.Module], Callable]
    dtype: str = "float32"


def _network(name: str) -> nn.Module:
    return timm.create_model(name).eval()


def _plain(network: nn.Module, image: Tensor, path: Path) -> None:
    write_onnx(network, image, False, {}, path)


def _custom(network: nn.Module, image: Tensor, path: Path) -> None:
    ours = any(isinstance(module, NeighborhoodAttention2d) for module in network.modules())
    write_onnx(network, image, False, {}, path, custom_op=ours)  # a peer's file is the plain one


def _int8(network: nn.Module, image: Tensor, path: Path, write: Callable = _plain) -> None:
    write(network, image, path)
    quantize_onnx(path, [torch.randn_like(image)])  # for speed alone: ranges of noise do


def _custom_int8(network: nn.Module, image: Tensor, path: Path) -> None:
    _int8(network, image, path, _custom)


def _eager(network: nn.Module, dtype: torch.dtype) -> Callable:
    network = copy.deepcopy(network).to(dtype)
    return lambda image: network(torch.from_numpy(image).to(dtype))


def _onnxruntime(path: Path) -> Callable:
    session = make_session(path, threads=torch.get_num_threads())
    return lambda image: session.run(None, {"image": image})


def _openvino(path: Path, precision: str) -> Callable:
    import openvino

    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # all threads on one request
    }
    compiled = openvino.Core().compile_model(path, "CPU", properties)
    return lambda image: compiled(image)


FORMS = {
    "eager": Form(None, None, partial(_eager, dtype=torch.float32)),
    "eager bfloat16": Form(None, None, partial(_eager, dtype=torch.bfloat16), "bfloat16"),
    "ONNX Runtime": Form("onnxruntime", _plain, _onnxruntime),
    "ONNX Runtime, custom operator": Form("onnxruntime", _custom, _onnxruntime),
    "ONNX Runtime int8": Form("onnxruntime", _int8, _onnxruntime, "int8"),
    "ONNX Runtime int8, custom operator": Form("onnxruntime", _custom_int8, _onnxruntime, "int8"),
    "OpenVINO": Form("openvino", _plain, partial(_openvino, precision="f32")),
    "OpenVINO bfloat16": Form("openvino", _plain, partial(_openvino, precision="bf16"), "bfloat16"),
}
FIELD_DTYPES = tuple(dict.fromkeys(form.dtype for form in FORMS.values() if form.dtype != "int8"))


def _installed(args: argparse.Namespace, forms: list[str]) -> list[str]:
    """Those forms whose package is here; of a package that is not, a note says so."""
    missing = {FORMS[form].package for form in forms if FORMS[form].package is not None}
    missing = sorted(package for package in missing if importlib.util.find_spec(package) is None)
    args.notes += [f"{package} is not installed: its forms are left out" for package in missing]
    return [form for form in forms if FORMS[form].package not in missing]


def _contestants(
    args: argparse.Namespace, names: list[str], forms: list[str], folder: Path
) -> dict[tuple[str, str], Callable]:
    """What runs an array [B, C, H, W], by network and form; what cannot be exported or loaded is noted."""
    found = {}
    for name in names:
        network, files = _network(name), {}
        for form in forms:
            _, write, load, _ = FORMS[form]
            try:
                if write is not None and write not in files:
                    files[write] = folder / f"{name}_{len(files)}.onnx"
                    write(network, torch.randn(2, 3, SIZE, SIZE), files[write])
                found[name, form] = load(network if write is None else files[write])
                found[name, form](np.zeros((2, 3, SIZE, SIZE), np.float32))
            except Exception as error:  # one that fails must not stop the suite
                found.pop((name, form), None)
                line = next(iter(str(error).splitlines()), "")
                args.notes.append(f"{name} is left out in {form}: {type(error).__name__}: {line}")
    return found


def _images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, SIZE, SIZE), np.float32)


def _rows(args: argparse.Namespace, found: dict[tuple[str, str], Callable], peer_form: str | None = None) -> list[dict]:
    """Speeds at --batch and, where that is another, one image at a time, over Swin-Tiny's in `peer_form` or else in the
    same form."""
    batches = sorted({args.batch, 1}, reverse=True)
    images = {batch: _images(batch) for batch in batches}
    calls: dict[tuple[str, str, int], Call] = {
        (*key, batch): partial(run, images[batch]) for key, run in found.items() for batch in batches
    }
    ms = interleaved(calls, args.seconds, args.device)
    rows = []
    for name, form in found:
        family, top1 = TOP1.get(name, (None, None))
        row = {"model": name, "family": family, "top-1": top1, "form": form}
        for batch in batches:
            row[f"images/s, batch {batch}"] = 1e3 * batch / ms[name, form, batch]
            if SWIN_TINY in args.models:  # None where it could not be run in this form
                peer = ms.get((SWIN_TINY, form if peer_form is None else peer_form, batch))
                row[f"over {short(SWIN_TINY)}, batch {batch}"] = peer and peer / ms[name, form, batch]
        rows.append(row)
    return rows


def runtime(args: argparse.Namespace) -> list[dict]:
    """Networks eager and in the runtimes that are installed, each form against Swin-Tiny in the same one."""
    with TemporaryDirectory() as folder:
        return _rows(args, _contestants(args, args.models, _installed(args, list(FORMS)), Path(folder)))


def field(args: argparse.Namespace) -> list[dict]:
    """The fastest form, of those in --dtype, of networks that are chosen for CPUs: speed and published accuracy."""
    dtype = str(args.dtype).removeprefix("torch.")
    forms = _installed(args, [name for name, form in FORMS.items() if form.dtype == dtype])
    image, fastest = _images(args.batch), {}
    with TemporaryDirectory() as folder:
        for name in args.models:  # one by one: all forms of all networks are more than 24 GiB
            found = _contestants(args, [name], forms, Path(folder))
            ms = interleaved({key: partial(run, image) for key, run in found.items()}, args.seconds, args.device)
            if ms:  # a network that runs in no form has its notes
                key = min(ms, key=ms.get)
                fastest[key] = found[key]
        rows = _rows(args, fastest, dict(list(fastest)).get(SWIN_TINY))
    return [{**row, "images/s": row[f"images/s, batch {args.batch}"]} for row in rows]
