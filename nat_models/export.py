"""One file that runs a model without this package: ONNX, torch.export, AOTInductor or TorchScript.

The file maps "image", [B, C, H, W] in float32, to "logits", [B, num_classes] in float32, for any B; of a UPerNet
[B, num_classes, H, W]. Its metadata holds "model", "preprocessing" (JSON) and "label_names" (a JSON list, empty if
unknown): metadata_props in ONNX, extra files in pt2 and TorchScript, get_metadata() of an AOTInductor package.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from . import onnx_graph, onnx_operator
from .checkpoints.saving import label_names
from .errors import UserError, missing_extra, require
from .fixed_size import fix_size
from .networks.upernet import UPerNet
from .ops import use_backend

OPSET = 25  # the newest that torch's exporter writes and onnxruntime reads
KEYS = ("model", "preprocessing", "label_names")
_SEGMENTED_SIZE = 512  # px, what UPerNet was trained at
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference that a check accepts, by the dtype of the computation and divided by max(1, largest logit). In
# float32 sums are in another order; in the others, dozens of layers round to 11 and 8 bits.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


class LowPrecision(nn.Module):
    """A model whose weights and computation are of a dtype, and whose input and outputs are float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, image: Tensor) -> Tensor:
        return tree_map(Tensor.float, self.model(image.to(self.dtype)))


class LowPrecisionWeights(LowPrecision):
    """The same with the computation in float32, for runtimes that have no kernels for less."""

    def forward(self, image: Tensor) -> Tensor:
        tensors = self.model.state_dict(keep_vars=True)
        weights = {name: x.float() for name, x in tensors.items() if x.is_floating_point()}
        return torch.func.functional_call(self.model, weights, (image,))


class Exported(NamedTuple):
    """A file that was loaded again; of a detector it gives several tensors."""

    run: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    metadata: dict[str, str]


def capture(model: nn.Module, image: Tensor, dynamic_size: bool) -> ExportedProgram:
    """The model as a graph in which batch, and with dynamic_size height and width, are symbols."""
    dynamic = {0: Dim.DYNAMIC, **({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if dynamic_size else {})}
    # Otherwise a graph is not for sizes, here numbers of tiles, that are 1. The ONNX exporter sets it for itself.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        return torch.export.export(model, (image,), dynamic_shapes=(dynamic,), strict=False)


def write_onnx(
    model: nn.Module, image: Tensor, dynamic_size: bool, metadata: dict[str, str], path: Path, custom_op: bool = False
) -> None:
    require_onnx()
    if not (dynamic_size or custom_op):
        model = fix_size(model, image)
    with use_backend("blocked") if custom_op else nullcontext():
        captured = capture(model, image, dynamic_size)
    save_onnx(captured, ["logits"], OPSET, metadata, path, custom_op)


def require_onnx() -> None:
    """Raises a UserError where a package that ONNX needs is missing."""
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401  better missed now than by --check
    except ModuleNotFoundError as e:
        raise missing_extra(e) or e from None


def save_onnx(
    captured: ExportedProgram,
    outputs: Sequence[str],
    opset: int,
    metadata: dict[str, str],
    path: Path,
    custom_op: bool = False,
) -> None:
    """Writes plain ONNX operators, or those and ours, with metadata; the graph takes "image"."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, CommonSubexpressionEliminationPass

    if custom_op:
        onnx_operator.check_captured(captured)
    program = torch.onnx.export(
        captured,
        input_names=["image"],
        output_names=outputs,
        dynamo=True,
        custom_translation_table=onnx_operator.translations() if custom_op else None,
        opset_version=opset,
        optimize=False,
        verbose=False,
    )
    # The index arithmetic of a level is the same in all its blocks. Shared before it is optimised, not after, it costs
    # a fraction of the time.
    CommonSubexpressionEliminationPass()(program.model)
    ClearMetadataAndDocStringPass()(program.model)  # this machine's paths
    program.optimize()
    if custom_op:
        onnx_graph.tokens_throughout(program.model)
    allowed = {"": opset, **({onnx_operator.DOMAIN: onnx_operator.VERSION} if custom_op else {})}
    if (domains := dict(program.model.opset_imports)) != allowed:
        raise UserError(f"The installed onnxscript could not write operators of {allowed} alone, only {domains}.")
    program.model.metadata_props.update(metadata)
    if custom_op:
        onnx_operator.annotate(program.model)
    program.save(path)


def load_onnx(path: Path) -> Exported:
    session = onnx_operator.make_session(path)

    def run(image: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = tuple(map(torch.from_numpy, session.run(None, {"image": image.numpy()})))
        return outputs if len(outputs) > 1 else outputs[0]

    return Exported(run, session.get_modelmeta().custom_metadata_map)


def write_pt2(model: nn.Module, image: Tensor, dynamic_size: bool, metadata: dict[str, str], path: Path) -> None:
    torch.export.save(capture(model, image, dynamic_size), path, extra_files=metadata)


def load_pt2(path: Path, keys: Sequence[str] = KEYS) -> Exported:
    metadata = dict.fromkeys(keys, "")
    return Exported(torch.export.load(path, extra_files=metadata).module(), metadata)


def write_aoti(model: nn.Module, image: Tensor, dynamic_size: bool, metadata: dict[str, str], path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        capture(model, image, dynamic_size),
        package_path=str(path),
        inductor_configs={"aot_inductor.metadata": metadata},
    )


def load_aoti(path: Path) -> Exported:
    package = torch._inductor.aoti_load_package(str(path))
    return Exported(package, package.get_metadata())


def write_torchscript(
    model: nn.Module, image: Tensor, _: bool, metadata: dict[str, str], path: Path, check_trace: bool = True
) -> None:
    # By default jit.trace records the custom operator; "exportable" records plain tensor operations.
    with use_backend("exportable"), warnings.catch_warnings():
        # Silence: argument checks that the trace leaves out, and TorchScript's deprecation.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(model, image, check_trace=check_trace), path, _extra_files=metadata)


def load_torchscript(path: Path, keys: Sequence[str] = KEYS) -> Exported:
    metadata = dict.fromkeys(keys, "")
    module = torch.jit.load(path, _extra_files=metadata)
    return Exported(module, {key: value.decode() for key, value in metadata.items()})


# Suffix, writer, loader
FORMATS = {
    "onnx": (".onnx", write_onnx, load_onnx),
    "pt2": (".pt2", write_pt2, load_pt2),
    "aoti": (".pt2", write_aoti, load_aoti),
    "torchscript": (".pt", write_torchscript, load_torchscript),
}


def largest_difference(run: Callable[[Tensor], Tensor], model: nn.Module, size: Sequence[int]) -> float:
    """Largest logit difference over random batches of 1 and 3, divided by max(1, largest logit)."""
    found = []
    for batch in (1, 3):
        image = torch.randn(batch, *size)
        expected = model(image)
        found.append((run(image) - expected).abs().max() / expected.abs().max().clamp(min=1))
    return max(found).item()


def check_output(output: Path, format: str, dynamic_size: bool, custom_op: bool = False) -> None:
    """Raises a UserError for what `export` would refuse."""
    suffix, _, _ = FORMATS[format]
    if not output.parent.is_dir():
        raise UserError(f"There is no folder {output.parent} for the output.")
    if output.suffix != suffix:
        raise UserError(f"The name of a file in the format {format} must end in {suffix}, got {output.name}.")
    if format == "aoti" and dynamic_size:
        raise UserError("--dynamic-size is not for the format aoti: what AOTInductor makes of it aborts when it runs.")
    if custom_op and format != "onnx":
        raise UserError(f"--custom-op is for the format onnx, got {format}.")
    if format != "torchscript":
        # 2.8 and 2.9 were seen to write graphs that hold for some sizes only.
        require("torch", "2.13", "torch.export, of which the formats onnx, pt2 and aoti are made,")


def write_file(output: Path, write: Callable[[Path], None]) -> None:
    """Writes to a temporary name, moves the file, and says how large it is."""
    started = time.perf_counter()
    temporary = output.with_name(f"{output.stem}.tmp{output.suffix}")
    try:
        write(temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    megabytes, seconds = output.stat().st_size / 1e6, time.perf_counter() - started
    print(f"{output}: {megabytes:.1f} MB in {seconds:.0f} s", flush=True)


def check_metadata(exported: Exported, metadata: dict[str, str]) -> None:
    """Raises a UserError where a file has not what it was given."""
    if lost := [key for key, value in metadata.items() if exported.metadata.get(key) != value]:
        raise UserError(f"The file lost its metadata: {', '.join(lost)}.")


@torch.no_grad()
def export(
    model: nn.Module,
    output: Path,
    *,
    format: str,
    name: str,
    img_size: int | None = None,
    dynamic_size: bool = False,
    dtype: str = "float32",
    check: bool = False,
    preprocessing: Mapping | None = None,
    labels: Sequence[str] | None = None,
    custom_op: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes the file and, if asked to, compares what it computes with the model.

    Args:
        model: A timm model, or a UPerNet, in evaluation; with another dtype than float32, its weights are changed.
        output: The file to write; ends in the format's suffix.
        format: onnx, pt2, aoti or torchscript.
        name: What the metadata call the model.
        img_size: Height and width; None means the model's, of a UPerNet 512 px.
        dynamic_size: Take any height and width from 32 px (TorchScript always does, AOTInductor never).
        dtype: Of the weights: float32, bfloat16 or float16. ONNX computes in float32 all the same.
        check: Load the file, run it, and print the largest difference.
        preprocessing: What the metadata say of it beside "input_size"; None means what the model says.
        labels: What the metadata call the classes; None means what the model says.
        custom_op: Let ONNX call the C++ kernel: the file needs onnx_operator.custom_ops_library().
        finish: Changes the written file before it has its name; nothing is written if it raises.

    Raises:
        UserError: The output is none for the format, a package is missing, or the check fails.
    """
    check_output(output, format, dynamic_size, custom_op)
    _, write, load = FORMATS[format]
    if custom_op:
        write = partial(write, custom_op=True)
    require("timm", "1.0.31", "nat_models.export")
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.data.model_config import resolve_input_data_config

    if isinstance(model, UPerNet):
        data_config = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, interpolation="bilinear")
        side = _SEGMENTED_SIZE if img_size is None else img_size
        data_config["input_size"] = (model.backbone.in_chans, side, side)
        own_labels = []
    else:
        data_config = resolve_input_data_config(model, dict(img_size=img_size))
        own_labels = label_names(model)
    data_config = {**data_config, **(preprocessing or {})}
    values = (name, json.dumps(data_config), json.dumps(own_labels if labels is None else list(labels)))
    metadata = dict(zip(KEYS, values, strict=True))
    computed = weights = DTYPES[dtype]
    if weights != torch.float32 and format == "onnx":
        model, computed = LowPrecisionWeights(model, weights), torch.float32
    elif weights != torch.float32:
        model = LowPrecision(model, weights)

    def write_finished(path: Path) -> None:
        write(model, torch.randn(2, *data_config["input_size"]), dynamic_size, metadata, path)
        if finish is not None:
            finish(path)

    write_file(output, write_finished)
    if not check:
        return
    exported = load(output)
    check_metadata(exported, metadata)
    channels, *size = data_config["input_size"]
    # Wide, with maps smaller than the window, and odd at every level.
    sizes = [size, *([(160, 288), (96, 96), (75, 107)] if dynamic_size else [])]
    worst = max(largest_difference(exported.run, model, (channels, *size)) for size in sizes)
    print(f"largest difference at {', '.join(f'{h}x{w}' for h, w in sizes)}: {worst:.1e}", flush=True)
    if not worst <= TOLERANCES[computed]:
        raise UserError(f"The largest difference must be at most {TOLERANCES[computed]:.0e}, got {worst:.1e}.")
