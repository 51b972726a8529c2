"""ONNX Runtime's operator nat_models::na2d: how a file calls the C++ kernel, and the library that holds it.

    na2d(qkv [B, H, W, 3, num_heads, head_dim], rpb [num_heads, 2*K_h-1, 2*K_w-1] or nothing) -> [B, H, W, num_heads,
    head_dim], all float32, with the attributes kernel_size and dilation, two ints each, and scale, a float.

The meaning is that of nat_models.na2d; ops/csrc/ort_shim.cpp is the other side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import UserError
from .ops.backends import native

if TYPE_CHECKING:
    import onnxruntime
    from onnx_ir import Model
    from torch.export import ExportedProgram

DOMAIN, VERSION = "nat_models", 1
METADATA_KEY = "custom_ops_library"
HOW_TO_REGISTER = "SessionOptions.register_custom_ops_library(nat_models.custom_ops_library())"


def custom_ops_library() -> str:
    """The path of the library for ONNX Runtime's register_custom_ops_library, 1.17 or newer.

    It is the C++ kernel's own, which needs neither PyTorch nor Python: in C++,
    `session_options.RegisterCustomOpsLibrary(path)`.

    Raises:
        RuntimeError: The kernel was not built or cannot run here; the message says why.
    """
    found, reason = native.available()
    if not found:
        raise RuntimeError(f"There is no library of custom operators: {reason}.")
    return str(native.library_path())


def make_session(path: Path, threads: int = 0) -> "onnxruntime.InferenceSession":
    """A session on the CPU, with the library registered where there is one.

    Args:
        path: Of the file.
        threads: Of the session; 0 leaves their number to ONNX Runtime.

    Raises:
        UserError: The file needs the library, and there is none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    found, reason = native.available()
    if found:
        options.register_custom_ops_library(custom_ops_library())
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's classes of errors have no class of their own
        if not found and f"{DOMAIN}:na2d" in str(error):
            raise UserError(f"{path} calls the C++ kernel, which cannot run here: {reason}.") from error
        raise


def check_captured(captured: "ExportedProgram") -> None:
    """Checks a graph that was captured under `use_backend("blocked")`.

    Raises:
        UserError: It has no neighborhood attention, or one that is not computed in float32.
    """
    operator = torch.ops.nat_models.na2d_qkvpacked.default
    dtypes = {node.args[0].meta["val"].dtype for node in captured.graph.nodes if node.target is operator}
    if not dtypes:
        raise UserError("--custom-op is for models with neighborhood attention, and this one has none.")
    if wrong := dtypes - {torch.float32}:
        raise UserError(f"The custom operator computes in float32, got a model in {', '.join(map(str, wrong))}.")


def translations() -> dict[Callable, Callable]:
    """For torch.onnx.export's custom_translation_table: the operators of this package as nodes of this domain."""
    import onnxscript
    from onnx.defs import OpSchema

    parameter, attribute, kinds = OpSchema.FormalParameter, OpSchema.Attribute, OpSchema.AttrType
    schema = OpSchema(
        "na2d",
        DOMAIN,
        VERSION,
        inputs=[
            parameter("qkv", "T"),
            parameter("rpb", "T", param_option=OpSchema.FormalParameterOption.Optional),
        ],
        outputs=[parameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            attribute("kernel_size", kinds.INTS),
            attribute("dilation", kinds.INTS),
            attribute("scale", kinds.FLOAT),
        ],
    )
    node = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), "na2d", schema)

    def na2d_qkvpacked(qkv, rpb, kernel_size, dilation, scale):
        return node(qkv, rpb, kernel_size=kernel_size, dilation=dilation, scale=scale)

    return {torch.ops.nat_models.na2d_qkvpacked.default: na2d_qkvpacked}


def annotate(model: "Model") -> None:
    """Says in the nodes of this domain, and in the metadata, what they need."""
    model.metadata_props[METADATA_KEY] = HOW_TO_REGISTER
    for node in model.graph:
        if node.domain == DOMAIN:
            node.doc_string = f"Needs {HOW_TO_REGISTER}."
