"""Changes of module settings beside tensors; each returns the number of changed modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

Change = Callable[[nn.Module], int]


def change_eps(part: str = "") -> Change:
    """Returns a change of eps of the norms whose name contains `part`."""

    def change(model: Any) -> int:
        kinds = (nn.LayerNorm, _BatchNorm)
        found = [m for name, m in model.named_modules() if part in name and isinstance(m, kinds)]
        for norm in found:
            norm.eps = 0.3
        return len(found)

    return change


def change_attributes(names: tuple[str, ...], value: Callable[[Any], Any]) -> Change:
    """Returns a change of attributes of these names, in all modules that have them."""

    def change(model: nn.Module) -> int:
        found = [(m, name) for m in model.modules() for name in names if name in vars(m)]
        for module, name in found:
            setattr(module, name, value(getattr(module, name)))
        return len(found)

    return change


def number_or_pair(number: int) -> Callable[[Any], Any]:
    """Returns a function that gives `number`, or a pair of it for an old pair."""
    return lambda old: number if isinstance(old, int) else type(old)([number, number])


def change_convolutions(applies: Callable[[nn.Conv2d], bool], **settings: Any) -> Change:
    def change(model: nn.Module) -> int:
        found = [m for m in model.modules() if isinstance(m, nn.Conv2d) and applies(m)]
        for conv in found:
            for name, value in settings.items():
                setattr(conv, name, value)
        return len(found)

    return change


def change_class(old: type[nn.Module], new: type[nn.Module]) -> Change:
    def change(model: Any) -> int:
        found: list[Any] = [m for m in model.modules() if type(m) is old]
        for module in found:
            module.__class__ = new
            module.negative_slope = 0.2
        return len(found)

    return change


@torch.no_grad()
def flip_index_in_place(model: nn.Module) -> int:
    found = [b for name, b in model.named_buffers() if name.endswith("relative_position_index")]
    for index in found:
        index.copy_(index.flatten().flip(0).view(index.shape))
    return len(found)


def replace_index(model: Any) -> int:
    found = [m for m in model.modules() if "relative_position_index" in m._buffers]
    for module in found:
        index = module.relative_position_index
        module.relative_position_index = index.flatten().flip(0).view(index.shape).clone()
    return len(found)


def change_statistics(model: nn.Module) -> int:
    """Changes running statistics by `F.batch_norm` on the buffers, which keeps their versions."""
    found = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in found:
        assert norm.running_mean is not None and norm.running_var is not None
        x = torch.linspace(-2, 5, 4 * norm.num_features * 9).view(4, 9, -1).transpose(1, 2)
        F.batch_norm(x, norm.running_mean, norm.running_var, training=True, momentum=0.5)
    return len(found)


def add_bias_to_mergings(model: Any) -> int:
    found = [m.reduction for m in model.modules() if hasattr(m, "reduction")]
    for linear in found:
        linear.bias = nn.Parameter(torch.ones(linear.out_features))
    return len(found)


CHANGES: dict[str, Change] = {
    "eps": change_eps(),
    "eps of one norm of a block": change_eps("before"),
    "eps of mergings": change_eps("downsample.norm"),
    "eps of stages": change_eps("hidden_states_norms"),
    "scale": change_attributes(("scale", "scaling"), lambda scale: 2 * scale),
    "function of the activation": change_attributes(("act",), lambda _: torch.tanh),
    "approximate": change_attributes(("approximate",), lambda _: "tanh"),
    "class of the activation": change_class(nn.ReLU, nn.LeakyReLU),
    "index in place": flip_index_in_place,
    "index replaced": replace_index,
    "shift": change_attributes(("shift_size",), number_or_pair(1)),
    "no shift": change_attributes(("shift_size",), number_or_pair(0)),
    "stride": change_convolutions(lambda conv: conv.stride == (2, 2), stride=(1, 1)),
    "stride of patches": change_convolutions(lambda conv: conv.stride == (4, 4), stride=(2, 2)),
    "padding and dilation": change_convolutions(
        lambda conv: conv.padding == (1, 1), padding=(2, 2), dilation=(2, 2)
    ),
    "padding mode": change_convolutions(
        lambda conv: conv.padding == (1, 1), padding_mode="reflect"
    ),
    "pool": change_attributes(("ceil_mode",), lambda _: True),
    "statistics": change_statistics,
    "a bias that was not there": add_bias_to_mergings,
}
