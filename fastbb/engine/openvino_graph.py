"""Rewrites of a model that OpenVINO converted, after which its CPU kernels copy less."""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

# from the product that computes q, k and v to the slices that take them
_TO_PARTS = re.compile("(Add )?(Roll )?Reshape Transpose (Reshape )*")


def rewrite_for_cpu(model: Any) -> None:
    """Rewrites a model in place; it computes the same."""
    _flatten_layer_norms(model)
    _split_products(model)
    model.validate_nodes_and_infer_types()


def _flatten_layer_norms(model: Any) -> None:
    """Gives layer norms of maps [B, H, W, C] tokens [B, H * W, C].

    OpenVINO has a kernel for at most two dimensions before those that are normalized, and computes
    others by several passes.

    Source: `MVN::isSupportedOperation` in OpenVINO's src/plugins/intel_cpu/src/nodes/mvn.cpp.
    """
    from openvino import opset13 as ops

    for norm in model.get_ops():
        if norm.get_type_name() != "MVN" or norm.get_output_partial_shape(0).rank.is_dynamic:
            continue
        shape = list(norm.get_output_partial_shape(0))
        if len(shape) < 4 or any(n.is_dynamic for n in shape[1:]):
            continue
        if _integers(norm.input_value(1)) not in ([-1], [len(shape) - 1]):
            continue
        lengths = [n.get_length() for n in shape[1:]]
        source = norm.input_value(0)
        others = [reader for reader in source.get_target_inputs() if reader.get_node() != norm]
        # 0: as it is
        tokens = ops.reshape(source, [0, -1, lengths[-1]], special_zero=True)
        norm.input(0).replace_source_output(tokens.output(0))
        norm.input(1).replace_source_output(ops.constant([-1]).output(0))
        norm.validate_and_infer_types()
        # the only reader of the tokens would write into them, so that they would be copied before
        _read(others, ops.reshape(tokens, [0, *lengths], special_zero=True))
        affine = _affine(norm, lengths[-1])
        readers = affine.output(0).get_target_inputs()
        _read(readers, ops.reshape(affine, [0, *lengths], special_zero=True))


def _affine(norm: Any, channels: int) -> Any:
    """The last node of the scale and shift of a layer norm, which it computes in the same pass."""
    from openvino import opset13 as ops

    last = norm
    while True:
        readers = _readers(last)
        if len(readers) != 1 or readers[0].get_type_name() not in ("Multiply", "Add"):
            return last
        index = _vector_input(readers[0], channels)
        if index is None:
            return last
        last = readers[0]
        vector = ops.constant(last.input_value(index).get_node().data.reshape(-1))
        last.input(index).replace_source_output(vector.output(0))
        last.validate_and_infer_types()


def _split_products(model: Any) -> None:
    """Computes q, k and v by products of their own.

    Out of one product they are copied twice: by the transpose that puts one after the other, and
    by OpenVINO's attention, which takes no part of a tensor.
    """
    from openvino import opset13 as ops

    for product in model.get_ops():
        if product.get_type_name() != "MatMul" or not _is_linear(product):
            continue
        chain = _chain(product)
        if not _TO_PARTS.fullmatch("".join(f"{node.get_type_name()} " for node in chain)):
            continue
        slices = _slices(_readers(chain[-1]))
        axis = _axis_of_parts(chain, len(slices))
        if axis is None:
            continue
        x = product.input_value(0)
        for roll in (node for node in chain if node.get_type_name() == "Roll"):
            x = ops.roll(x, roll.input_value(1), roll.input_value(2))
        weights = np.split(product.input_value(1).get_node().data, len(slices))
        for i, weight in enumerate(weights):
            part = ops.matmul(x, ops.constant(weight), False, True)
            readers = slices[i].output(0).get_target_inputs()
            _read(readers, _one_part(chain, part, i, len(slices), axis))


def _one_part(chain: list[Any], part: Any, i: int, n: int, axis: int) -> Any:
    """Computes of a part what a chain of nodes computes of n parts; rolls are done."""
    from openvino import opset13 as ops

    for node in chain:
        kind = node.get_type_name()
        if kind == "Add":
            bias = node.input_value(_vector_input(node)).get_node().data
            part = ops.add(part, ops.constant(np.split(bias.reshape(-1), n)[i]))
        elif kind == "Reshape":
            shape = _integers(node.input_value(1))
            shape[axis] = 1
            part = ops.reshape(part, shape, **node.get_attributes())
        elif kind == "Transpose":
            part = ops.transpose(part, node.input_value(1))
            axis = 0
    return part


def _axis_of_parts(chain: list[Any], n: int) -> int | None:
    """The axis of n parts after the first reshape of a chain, or None if it cannot be split."""
    kinds = [node.get_type_name() for node in chain]
    shaped, moved = chain[kinds.index("Reshape")], chain[kinds.index("Transpose")]
    order = _integers(moved.input_value(1))
    if n < 2 or order is None:
        return None
    axis, channels = order[0], shaped.input_value(0).get_partial_shape()[-1]
    parts = list(shaped.get_output_partial_shape(0))[axis:]
    if any(part.is_dynamic for part in parts) or parts[0] != n:
        return None
    if math.prod(part.get_length() for part in parts) != channels:
        return None
    if any(node.get_output_partial_shape(0)[0] != n for node in chain[chain.index(moved) :]):
        return None
    return axis if all(map(_is_of_channels, chain)) else None


def _is_of_channels(node: Any) -> bool:
    """Whether a node computes each part of the channels for itself, from constant settings."""
    shape = node.get_output_partial_shape(0)
    if node.get_type_name() == "Add":
        return shape[-1].is_static and _vector_input(node, shape[-1].get_length()) is not None
    if node.get_type_name() == "Roll":
        axes = _integers(node.input_value(2))
        return axes is not None and all(0 <= axis < len(shape) - 1 for axis in axes)
    return _integers(node.input_value(1)) is not None


def _slices(readers: list[Any]) -> list[Any]:
    """The readers in the order of the parts that they take, if each takes one of the first axis."""
    found = {}
    for reader in readers:
        if reader.get_type_name() != "Slice" or reader.get_input_size() != 5:
            return []
        start, stop, step, axes = (_integers(reader.input_value(i)) for i in range(1, 5))
        if not start or stop != [start[0] + 1] or step != [1] or axes != [0]:
            return []
        found[start[0]] = reader
    ordered = [found.get(i) for i in range(len(readers))]
    return [] if None in ordered else ordered


def _chain(node: Any) -> list[Any]:
    """The nodes after one, as long as each is the only reader of the one before."""
    chain: list[Any] = []
    while len(readers := _readers(node)) == 1:
        node = readers[0]
        chain.append(node)
    return chain


def _readers(node: Any) -> list[Any]:
    return [reader.get_node() for reader in node.output(0).get_target_inputs()]


def _read(inputs: Iterable[Any], node: Any) -> None:
    """Makes inputs read a node."""
    for one in inputs:
        one.replace_source_output(node.output(0))


def _is_linear(product: Any) -> bool:
    """Whether a product is that of a linear layer, with a constant weight [N, K]."""
    how, weight = product.get_attributes(), product.input_value(1).get_node()
    is_constant = weight.get_type_name() == "Constant" and weight.data.ndim == 2
    return is_constant and how["transpose_b"] and not how["transpose_a"]


def _vector_input(node: Any, channels: int | None = None) -> int | None:
    """Position of the input of a node that is a constant along the channels, or None."""
    for position, value in enumerate(node.input_values()):
        constant = value.get_node()
        if constant.get_type_name() == "Constant" and constant.data.ndim:
            size = constant.data.shape[-1]
            if constant.data.size == size and channels in (None, size):
                return position
    return None


def _integers(value: Any) -> Any:
    """The numbers of a constant vector as a list, or None."""
    node = value.get_node()
    return node.data.tolist() if node.get_type_name() == "Constant" else None
