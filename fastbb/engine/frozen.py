"""Rewrites of an exported graph whose weights do not change any more."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

_LINEAR = torch.ops.aten.linear.default
_GELU = torch.ops.aten.gelu.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@torch.no_grad()
def fold_constants(graph: fx.GraphModule) -> None:
    """Computes now what does not depend on the inputs of a graph, and puts it in as constants.

    Raises:
        NotImplementedError: the graph writes into what would be a constant.
    """
    values: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            values[node] = _attribute(graph, node.target)
        elif _writes_to(node, values):
            raise NotImplementedError(f"{node} writes into a constant")
        elif _is_constant(node, values):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    n_constants = 0
    for node, value in values.items():
        # what only constants read is computed already
        if node.op == "get_attr" or not any(user not in values for user in node.users):
            continue
        if not isinstance(value, Tensor):
            continue
        name = f"_folded_{n_constants}"
        n_constants += 1
        graph.register_buffer(name, value.contiguous())
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def linear_to_convolution(graph: fx.GraphModule) -> None:
    """Makes 1x1 convolutions of linear layers, which another library multiplies.

    A GELU that follows is put before the way back, so that it becomes part of the convolution.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_LINEAR):
        x, weight, *bias = node.args
        if weight.op != "get_attr":
            continue
        followers = [user for user in node.users if user.target is _GELU]
        gelu = followers[0] if len(followers) == len(node.users) == 1 else None
        approximate = None if gelu is None else gelu.kwargs.get("approximate", "none")
        arguments = (x, weight, *(bias or [None]), approximate)
        _replace(graph, gelu or node, _linear_as_convolution, arguments)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def attention_to_products(graph: fx.GraphModule) -> None:
    """Writes attention out, for a compiler makes one pass of all between the two products.

    On windows of some 50 tokens that is faster than PyTorch's own for CPUs.
    """
    for node in graph.graph.find_nodes(op="call_function", target=_ATTENTION):
        q, k, v, *rest = node.args
        named = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest)) | node.kwargs
        mask, scale = named.pop("attn_mask", None), named.pop("scale", None)
        if mask is not None and not any(named.values()):
            _replace(graph, node, _attention, (q, k, v, mask, scale))
    graph.recompile()


def _replace(graph: fx.GraphModule, node: fx.Node, function: Any, arguments: Any) -> None:
    with graph.graph.inserting_before(node):
        node.replace_all_uses_with(graph.graph.call_function(function, arguments))
    graph.graph.erase_node(node)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """`F.scaled_dot_product_attention` of [..., N, head_dim]."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-2, -1)) * factor + mask
    return F.softmax(scores, dim=-1) @ v


def _linear_as_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str | None
) -> Tensor:
    """`F.linear` of [..., K] with [N, K]: the rows are the pixels of one image.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        approximate: of the GELU that follows; None: none does.
    """
    rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    y = torch.conv2d(rows, weight[:, :, None, None], bias)
    if approximate is not None:
        y = F.gelu(y, approximate=approximate)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _attribute(graph: fx.GraphModule, target: str) -> Any:
    value: Any = graph
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _writes_to(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether an operation changes one of its inputs that is known."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    named = {a.name: x for a, x in zip(node.target._schema.arguments, node.args)} | node.kwargs
    written = (named.get(a.name) for a in node.target._schema.arguments if a.is_write)
    return any(isinstance(x, fx.Node) and x in values for x in written)


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether an operation without side effects reads nothing but constants."""
    target = node.target
    if node.op != "call_function" or not all(n in values for n in node.all_input_nodes):
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return not is_random and not target._schema.is_mutable and bool(target._schema.returns)
