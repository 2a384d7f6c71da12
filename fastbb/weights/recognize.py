"""Recognizes batch norms and activations of any library, by what they compute."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fastbb_kernels import ACTIVATIONS

from .folded_weights import FROZEN_EPS, fold_batch_norm
from .watch import is_observed

# frozen norms have no common class: torchvision, timm, detectron2 and a dozen files of transformers
# define their own under one of these names
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")


def is_batch_norm(module: nn.Module | None) -> bool:
    """Whether a module is a 2d batch norm of any library, frozen, synchronized or with activation.

    The class decides. `norm_problem` checks that the module computes a batch norm.
    """
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return True
    return type(module).__name__.endswith(_FROZEN)


def own_activation(norm: nn.Module) -> nn.Module | None:
    """The activation that a BatchNormAct2d runs, or None; a converted norm may not run its own."""
    act = None if type(norm).forward in _PLAIN_FORWARDS else getattr(norm, "act", None)
    return None if isinstance(act, nn.Identity) else act


_PLAIN_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


@torch.no_grad()
def norm_problem(norm: Any) -> str | None:
    """Checks by a computation whether a norm can be folded; returns the reason if it cannot."""
    if is_observed(norm):
        return "it has hooks"
    if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
        return "it drops values at random"
    if type(norm).forward in _PLAIN_FORWARDS or isinstance(norm.running_mean, FakeTensor):
        return None
    # a copy with random values: with those of a new model, other functions equal a batch norm
    norm = copy.deepcopy(norm).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    like: Any = {"device": "cpu", "dtype": torch.float32}  # not torch's defaults, which may differ
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.is_floating_point():
            low = 0.5 if name == "running_var" else -1.5
            values = torch.rand(tensor.shape, generator=generator, **like)
            tensor.copy_(values * (1.5 - low) + low)
    channels = len(norm.running_mean)
    x = torch.linspace(-3, 3, 4 * channels, **like).view(1, channels, 2, 2)
    one = torch.ones(channels, 1, 1, 1, **like)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    scale, shift = fold_batch_norm(one, None, *statistics, eps=getattr(norm, "eps", FROZEN_EPS))
    want = (x.double() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).float()
    act = own_activation(norm)
    want = want if act is None else act(want)
    if not torch.allclose(norm(x), want, rtol=1e-5, atol=1e-5):
        return f"a {type(norm).__name__} does not compute what batch norms do"
    return None


@torch.no_grad()
@unset_fake_temporarily()
def activation_name(module: nn.Module | None) -> str | None:
    """The name in `ACTIVATIONS` of the function that a module computes, or None.

    Libraries have many classes for the same function, so outputs are compared and not classes.
    """
    if module is None or isinstance(module, nn.Identity) or is_observed(module):
        return None
    if next(module.parameters(), None) is not None:
        return None
    x = torch.linspace(-8, 8, 256, device="cpu", dtype=torch.float32).view(1, 4, 8, 8)
    try:
        got = module(x.clone())
    except (RuntimeError, ValueError, TypeError):  # no activation refuses this tensor
        return None
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return None
    for name, function in ACTIVATIONS.items():
        if torch.allclose(got, function(x), rtol=1e-6, atol=1e-6):
            return name
    return None
