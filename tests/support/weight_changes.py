"""Changes of a model's weights that are followed without `refresh`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW

FACTOR = 0.7


def optimizer_step(optimizer: Any, **options: Any) -> Callable[[Any], None]:
    """Returns a change by one step of an optimizer."""

    def change(model: Any) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer(model.parameters(), lr=0.1, **options).step()

    return change


@torch.no_grad()
def scale_(model: Any) -> None:
    for p in model.parameters():
        p.mul_(FACTOR)


def replace_data(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data * FACTOR


def replace_parameters(model: Any) -> None:
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            p.data.mul_(FACTOR)  # in the same memory, without a change of version
            setattr(module, name, nn.Parameter(p.data))


def load(assign: bool = False, wrap: bool = False) -> Callable[[Any], None]:
    """Returns a change by `load_state_dict`, of the model or of a module around it."""

    def change(model: Any) -> None:
        module = nn.Sequential(model) if wrap else model
        state = {
            name: tensor.detach() * FACTOR if tensor.is_floating_point() else tensor
            for name, tensor in module.state_dict().items()
        }
        module.load_state_dict(state, assign=assign)

    return change


WEIGHT_CHANGES: dict[str, Callable[[Any], Any]] = {
    "adamw-fused": optimizer_step(AdamW, fused=True),
    "adamw-foreach": optimizer_step(AdamW, foreach=True),
    "sgd-fused": optimizer_step(SGD, fused=True),
    "in_place": scale_,
    "in_place-inference_mode": torch.inference_mode()(scale_),
    "data_replaced": replace_data,
    "parameters_replaced": replace_parameters,
    "load": load(),
    "load-wrapped": load(wrap=True),
    "load-assign": load(assign=True),
    "load-inference_mode": torch.inference_mode()(load()),
    "load-assign-inference_mode": torch.inference_mode()(load(assign=True)),
}
