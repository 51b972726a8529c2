"""An ONNX file in int8: its linear layers and convolutions, on weights and activations whose ranges images have shown.

The products of the attention, softmax, norms and everything between them stay in float32. Weights are int8, per output
channel; activations are uint8, per tensor, as VNNI multiplies them. The file holds plain ONNX operators, QuantizeLinear
and DequantizeLinear among them, or those and the custom operator.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .export import load_onnx, require_onnx
from .onnx_operator import make_session

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto
    from onnxruntime.quantization.calibrate import TensorsData

LEAST_COSINE = 0.995  # of logits with those of float32, the mean of images; below it a file is refused
_QUANTIZED = ("MatMul", "Gemm", "Conv")
# ONNX Runtime has a product of int8 whose output is float32 for these. Requantised, the output of a linear layer would
# lose accuracy, and be made float32 again for what follows it.
_FLOAT_OUTPUTS = ("MatMul", "Gemm")


class Agreement(NamedTuple):
    """How near the logits of two files are.

    Attributes:
        images: How many were compared.
        cosine: Between logits, the mean of the images.
        least_cosine: That of the image that differs most.
        top1: Part of the images on whose first class both agree.
    """

    images: int
    cosine: float
    least_cosine: float
    top1: float

    def __str__(self) -> str:
        return (
            f"cosine of logits {self.cosine:.5f} (least {self.least_cosine:.5f}), "
            f"the same first class for {self.top1:.1%} of {self.images} images"
        )


class _Reader:
    """Calibration images as onnxruntime asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches: Iterator[Tensor] = iter(batches)
        self.images = 0

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        if batch is None:
            return None
        self.images += len(batch)
        return {"image": batch.numpy()}


def quantize_onnx(path: Path, calibration: Iterable[Tensor], output: Path | None = None) -> int:
    """Quantises a file that `export` wrote.

    Args:
        path: A file in the format onnx, in float32.
        calibration: Batches [B, C, H, W] of images that are preprocessed as the model asks.
        output: The file to write, with the same metadata; None takes the place of the one that is read.

    Returns:
        How many images were seen.

    Raises:
        UserError: A package is missing, or there is no image.
    """
    require_onnx()
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    _fold_weights(model)
    constants = {initializer.name for initializer in model.graph.initializer}
    quantized = [node for node in model.graph.node if node.op_type in _QUANTIZED]
    # The second factor of a product in the attention is computed.
    attention = [node.name for node in quantized if node.input[1] not in constants]
    reader = _Reader(calibration)
    with TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        onnx.save(model, temporary)
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=_ranges(temporary, reader),
            nodes_to_quantize=[],
            nodes_to_exclude=attention,
            op_types_to_quantize=list(_QUANTIZED),
            extra_options={"OpTypesToExcludeOutputQuantization": list(_FLOAT_OUTPUTS)},
        )
        result = quantizer.quantize_model()
        onnx.helper.set_model_props(result, metadata)  # the quantiser adds notes to itself
        onnx.save(result, temporary)
        os.replace(temporary, path if output is None else output)
    return reader.images


def _ranges(path: Path, reader: _Reader) -> "TensorsData":
    """The least and greatest values of the activations over the reader's images."""
    from onnxruntime.quantization import MinMaxCalibrater

    class Calibrater(MinMaxCalibrater):
        def create_inference_session(self) -> None:
            # Theirs registers no custom operators.
            self.infer_session = make_session(Path(self.augmented_model_path))

    calibrater = Calibrater(path, list(_QUANTIZED), str(path.with_name("augmented.onnx")))
    calibrater.augment_graph()
    calibrater.create_inference_session()
    calibrater.collect_data(reader)
    return calibrater.compute_data()


def _fold_weights(model: "ModelProto") -> None:
    """Makes initializers of weights and biases that are computed from initializers alone, as nat_models.fixed_size
    writes them: only initializers become int8 once and for all. Masks, which are larger, stay as they are written."""
    import onnx
    import onnxruntime

    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    known = {initializer.name: True for initializer in graph.initializer} | {"": True}  # "" is an input left out

    def constant(name: str) -> bool:
        if name not in known:
            node = made_by.get(name)
            known[name] = node is not None and all(map(constant, node.input))
        return known[name]

    initializers = set(known)
    layers = [node for node in graph.node if node.op_type in _QUANTIZED and not constant(node.output[0])]
    computed = {name for node in layers for name in node.input[1:] if constant(name)} - initializers
    if computed:
        infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in sorted(computed)]
        part = onnx.ModelProto()
        part.CopyFrom(model)
        del part.graph.input[:], part.graph.output[:]
        part.graph.output.extend(infos)
        _drop_unused(part.graph)
        session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
        values = map(onnx.numpy_helper.from_array, session.run(sorted(computed), {}), sorted(computed))
        for node in graph.node:
            node.output[:] = ["" if name in computed else name for name in node.output]
        graph.initializer.extend(values)
    _drop_unused(graph)


def _drop_unused(graph: "GraphProto") -> None:
    """Removes nodes and initializers of which no output of the graph depends."""
    wanted = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):  # ONNX orders nodes so that each stands after what it takes
        if wanted.isdisjoint(filter(None, node.output)):
            graph.node.remove(node)
        else:
            wanted.update(node.input)
    for initializer in list(graph.initializer):
        if initializer.name not in wanted:
            graph.initializer.remove(initializer)


def compare(path: Path, other: Path, batches: Iterable[Tensor]) -> Agreement:
    """How near the logits of two files are, over batches [B, C, H, W] of images, in ONNX Runtime."""
    runs = [load_onnx(p).run for p in (path, other)]
    cosines, same = [], []
    for batch in batches:
        logits = [run(batch) for run in runs]
        cosines.append(torch.nn.functional.cosine_similarity(*logits))
        same.append(logits[0].argmax(1) == logits[1].argmax(1))
    cosine, equal = torch.cat(cosines), torch.cat(same).float()
    return Agreement(len(cosine), cosine.mean().item(), cosine.min().item(), equal.mean().item())


def quantize_checked(
    path: Path, calibration: Iterable[Tensor], held_out: Iterable[Tensor], least_cosine: float = LEAST_COSINE
) -> None:
    """Quantises a file in place, as `quantize_onnx` does, and prints how near it stays to what it was.

    Args:
        path: A file in the format onnx, in float32.
        calibration: Batches [B, C, H, W] that ranges are taken from.
        held_out: Batches of other images, on which both are compared.
        least_cosine: What the mean cosine of logits has to be.

    Raises:
        UserError: The cosine is less; the file at `path` is then what it was.
    """
    quantized = path.with_name(f"{path.stem}.int8.onnx")
    try:
        count = quantize_onnx(path, calibration, quantized)
        agreement = compare(quantized, path, held_out)
        print(f"int8, calibrated on {count} images; {agreement}", flush=True)
        if not agreement.cosine >= least_cosine:
            raise UserError(
                f"The cosine of int8 logits with those of float32 must be at least {least_cosine}, "
                f"got {agreement.cosine:.5f} over {agreement.images} images: nothing was written."
            )
        os.replace(quantized, path)
    finally:
        quantized.unlink(missing_ok=True)
