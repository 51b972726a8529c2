"""Exported graphs with fewer Reshapes, each of which is a node that runs.

The networks' blocks take and return maps [B, H, W, C], add tokens [B, H * W, C] and view the one as the other all the
time, which costs PyTorch nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_ir import Model, Node, Value


def tokens_throughout(model: "Model") -> None:
    """Lets what works on the last axis alone take tokens as they come, and drops the Reshapes that nothing needs then.

    Which shapes are equal is read from those that the exporter wrote; what it left open stays as it is.
    """
    for node in list(model.graph):
        if node.op_type == "Reshape" and node.graph is not None:
            _pass_by(node)
    for node in list(model.graph):
        if node.op_type == "Reshape" and _shape(node.inputs[0]) == _shape(node.outputs[0]) is not None:
            _replace(node.outputs[0], node.inputs[0])
    model.graph.sort()


def _pass_by(reshape: "Node") -> None:
    """A chain of operators on the last axis, from a Reshape to another one, needs but one of the two."""
    chain: list[Node] = []
    end = reshape
    while end is reshape or _is_row_wise(end):
        chain.append(end)
        uses = end.outputs[0].uses()
        if len(uses) != 1 or end.outputs[0].is_graph_output() or uses[0].idx != 0:
            return
        end = uses[0].node
    before, first = _shape(reshape.inputs[0]), _shape(reshape.outputs[0])
    last, after = _shape(end.inputs[0]), _shape(end.outputs[0])
    if end.op_type != "Reshape" or None in (before, first, last, after) or _copies_sizes(end):
        return
    if before[-1] == first[-1] or len(chain) == 1:
        rows = before[:-1]
        _replace(reshape.outputs[0], reshape.inputs[0])
    elif after[-1] == last[-1] == first[-1]:
        rows = after[:-1]
        reshape.replace_input_with(1, end.inputs[1])
        reshape.outputs[0].shape = end.outputs[0].shape
        _replace(end.outputs[0], end.inputs[0])
    else:
        return
    for node in chain[1:]:
        output = node.outputs[0]
        output.shape = type(output.shape)([*rows, output.shape[-1]])


def _is_row_wise(node: "Node") -> bool:
    """Whether an operator has one input that is no constant, the first, and works on its last axis alone."""
    ranks = {"Gelu": 0, "Add": 1, "Mul": 1, "LayerNormalization": 1, "MatMul": 2}
    if node.domain or node.op_type not in ranks or len(node.outputs) != 1:
        return False
    axis = node.attributes.get("axis")
    if axis is not None and axis.as_int() != -1:
        return False
    return all(
        x is not None and x.const_value is not None and len(x.const_value.shape) == ranks[node.op_type]
        for x in node.inputs[1:]
    )


def _copies_sizes(reshape: "Node") -> bool:
    """Whether a Reshape takes sizes from its input, by zeros in its target."""
    target = reshape.inputs[1].const_value
    return target is not None and 0 in target.numpy() and not reshape.attributes.get_int("allowzero", 0)


def _shape(value: "Value") -> tuple | None:
    """The sizes, ints or names; None where one is unknown."""
    if value.shape is None:
        return None
    sizes = tuple(x if isinstance(x, int) else x.value for x in value.shape)
    return None if None in sizes else sizes


def _replace(value: "Value", other: "Value") -> None:
    """Lets who takes a value take another one, and drops the node that made it."""
    from onnx_ir.convenience import replace_all_uses_with

    if value.is_graph_output():
        return
    replace_all_uses_with(value, other)
    node = value.producer()
    node.graph.remove(node, safe=True)
