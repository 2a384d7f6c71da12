"""Holds a backbone, however it runs, to its own library's model, stage by stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb_kernels.accuracy import (
    accuracy_problem,
    allowed_error,
    allowed_rel,
    max_error,
    max_magnitude,
)
from fastbb_kernels.machine import find_device

from ..backbone.base import Backbone
from ..backbone.registry import Upstream
from ..engine.explanation import table
from ..engine.settings import DTYPES
from .loading import load_backbone
from .upstream import run_upstream, upstream_from, upstream_of

_BATCH = 2


@dataclass(frozen=True)
class VerifiedMap:
    """One feature map of one input. Errors are relative to the largest exact magnitude.

    Attributes:
        input_shape: [B, C, H, W] of the images.
        stage: name of the stage.
        shape: [B, C, h, w] of the map.
        error: largest difference from the exact map.
        allowed: largest difference that passes.
        reference_error: what the reference itself loses in the backbone's dtype.
        problem: why the map does not pass, or None.
    """

    input_shape: tuple[int, ...]
    stage: str
    shape: tuple[int, ...]
    error: float
    allowed: float
    reference_error: float
    problem: str | None

    @property
    def passed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class VerifyReport:
    """Result of `verify`; shown as a table.

    Attributes:
        backbone: what was verified: class, dtype and device.
        reference: what it was held to.
        rule: what was allowed, in a sentence.
        rows: one for each map of each input.
        notes: what a reader should know besides, a sentence each.
    """

    backbone: str
    reference: str
    rule: str
    rows: tuple[VerifiedMap, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def __repr__(self) -> str:
        lines: list[tuple[str, ...]] = [
            ("input", "stage", "map", "error", "allowed", "reference's own", "")
        ]
        for row in self.rows:
            numbers = (f"{e:.1e}" for e in (row.error, row.allowed, row.reference_error))
            result = "ok" if row.problem is None else f"WRONG: {row.problem}"
            lines.append((_by(row.input_shape), row.stage, _by(row.shape), *numbers, result))
        wrong = sum(not row.passed for row in self.rows)
        verdict = f"{wrong} of {len(self.rows)} maps are wrong" if wrong else "passed"
        return "\n".join(
            [
                f"{self.backbone} against {self.reference}: {verdict}",
                f"rule: {self.rule}",
                table(lines),
                *(f"note: {note}" for note in self.notes),
            ]
        )


@torch.no_grad()
def verify(
    backbone: Backbone,
    reference: str | nn.Module = "auto",
    inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    batch: int = _BATCH,
) -> VerifyReport:
    """Compares every feature map that a backbone returns with the reference's in float64.

    The reference runs as a copy, in eval mode; the backbone's weights, flags and torch's random
    numbers stay as they are.

    Args:
        backbone: in eval mode, prepared or not; runs as it runs for its user.
        reference: "auto" is the model of the library that the backbone's semantics are of, with the
            backbone's weights; or any module that returns `.feature_maps`, or a list, tuple or dict
            of maps [B, C, h, w], in the order of `out_features`.
        inputs: images [B, C, H, W], or several such tensors; they are converted to the backbone's
            dtype and device. Default: random images at the model's size, and some at another
            size if the reference takes one.
        batch: images of each of those sizes.

    Raises:
        ValueError: the backbone is in training mode, or an input or the reference does not fit it.
    """
    if any(module.training for module in backbone.modules()):
        raise ValueError("verify compares what inference computes; call backbone.eval() first")
    why_not_upstream = None
    if isinstance(reference, nn.Module):
        upstream = upstream_from(reference, backbone)
    elif reference == "auto":
        upstream, why_not_upstream = upstream_of(backbone)
    else:
        raise ValueError(f"reference must be 'auto' or a module, got {reference!r}")
    notes = [f"the reference is our own: {why_not_upstream}"] if why_not_upstream else []
    if inputs is None:
        batches = _default_inputs(backbone, upstream, batch, notes)
    else:
        batches = _given_inputs(backbone, inputs)
    rel = backbone.exactness
    rows = []
    for pixels in batches:
        # the backbone first: it says best what is wrong with an input
        got = backbone(pixels, return_dict=True).feature_maps
        engine = backbone._engine
        # what the backbone was allowed, such as TF32, shows in the reference's own error
        run = partial(run_upstream, upstream)
        eager = run(pixels) if engine is None else engine.in_precision(run, pixels)
        exact = run(pixels.double())
        for stage, ours, lossy, true in zip(backbone.out_features, got, eager, exact):
            if isinstance(reference, nn.Module) and true.shape != ours.shape:
                raise ValueError(
                    f"reference must return {list(ours.shape)} for {stage}, as the backbone does, "
                    f"got {list(true.shape)}"
                )
            rows.append(_compared(tuple(pixels.shape), stage, ours, lossy, true, rel))
    if backbone.dtype == torch.float32 and any(row.allowed > 1.001 * rel for row in rows):
        notes.append(
            f"the reference itself loses more than {rel:g} in fp32; twice its own error is allowed"
        )
    return VerifyReport(
        f"{type(backbone).__name__} in {_dtype_name(backbone.dtype)} on {backbone.device}",
        upstream.name,
        _rule(backbone.dtype, rel),
        tuple(rows),
        tuple(notes),
    )


def verify_model(
    name: str,
    sizes: Sequence[tuple[int, int]] = (),
    batch: int = _BATCH,
    precision: str = "fp32",
    device: str | None = None,
    out_indices: Sequence[int] | None = None,
    mode: str | None = None,
    random_weights: bool = False,
) -> VerifyReport:
    """Loads a backbone as users do and verifies it; the command `fastbb verify-model`.

    Args:
        name: as `AutoBackbone.from_pretrained` takes it.
        sizes: (height, width) of random images; default: those of `verify`.
        batch: images of each size.
        precision: "fp32", "bf16" or "fp16".
        device: cpu, cuda or cuda:N; default: a GPU if there is one.
        out_indices: of the maps; default: the model's own.
        mode: to prepare it in; default: it runs as loaded.
        random_weights: loads no weights; the model and its reference get the same random ones.

    Raises:
        OSError: there is no such model, or it cannot be had.
        ValueError: an argument is invalid.
    """
    where = find_device(device)
    dtype = torch.float32 if mode is not None else DTYPES[precision]
    backbone = load_backbone(name, out_indices, dtype, where, random_weights)
    if mode is not None:
        example = (batch, *(sizes[0] if sizes else backbone.default_size))
        backbone = backbone.prepare(mode=mode, precision=precision, example=example)
    images = [random_images(backbone, size, batch) for size in sizes]
    return verify(backbone, inputs=images or None, batch=batch)


def random_images(
    backbone: Backbone, size: tuple[int, int], batch: int = _BATCH, seed: int = 0
) -> Tensor:
    """Seeded images [B, C, H, W] for a backbone that look like normalized photos to it.

    Like photos they have more of coarse structure than of fine; mean 0 and standard deviation 1.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    pixels = torch.zeros(batch, backbone.config.num_channels, height, width, device="cpu")
    for scale in (1, 4, 16, 64):
        shape = (*pixels.shape[:2], -(-height // scale), -(-width // scale))
        noise = torch.randn(shape, generator=generator, device="cpu")
        pixels += scale**0.5 * F.interpolate(noise, size, mode="bilinear")
    std, mean = torch.std_mean(pixels, (1, 2, 3), keepdim=True)
    return ((pixels - mean) / std).to(backbone.device, backbone.dtype)


def _default_inputs(
    backbone: Backbone, upstream: Upstream, batch: int, notes: list[str]
) -> list[Tensor]:
    """Images at the model's size, and at a smaller one of another shape that the reference takes.

    The smaller one comes second: a model may have got used to the first size.
    """
    height, width = backbone.default_size
    images = [random_images(backbone, (height, width), batch)]
    odd = (3 * height // 4 - 1, 7 * width // 8 + 1)
    # what most models divide by: a patch, or five halvings
    even = (max(3 * height // 128, 1) * 32, max(7 * width // 256, 1) * 32)
    for size in (odd, even):
        smaller = random_images(backbone, size, batch, seed=1)
        try:
            run_upstream(upstream, smaller)
        except Exception:  # whatever a library raises: it does not take this size
            continue
        return [*images, smaller]
    notes.append("the reference takes no other size")
    return images


def _given_inputs(backbone: Backbone, inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    batches = [inputs] if isinstance(inputs, Tensor) else inputs
    wanted = isinstance(batches, (list, tuple)) and all(isinstance(b, Tensor) for b in batches)
    if not wanted or not batches:
        raise ValueError(
            f"inputs must be images [B, C, H, W] or a list of such tensors, got {inputs!r:.80}"
        )
    return [batch.to(backbone.device, backbone.dtype) for batch in batches]


def _compared(
    input_shape: tuple[int, ...], stage: str, got: Tensor, eager: Tensor, exact: Tensor, rel: float
) -> VerifiedMap:
    largest = max_magnitude(exact) or 1.0
    same = got.shape == eager.shape == exact.shape
    error, lost = (max_error(m, exact) if same else float("nan") for m in (got, eager))
    rel = allowed_rel(eager, exact, rel) if same else rel
    allowed = allowed_error(eager, exact, rel) if same else float("nan")
    if eager.isfinite().all() and exact.isfinite().all():
        problem = accuracy_problem(got, eager, exact, rel)
    else:
        problem = f"the reference itself is not finite in {_dtype_name(eager.dtype)}"
    errors = (error / largest, allowed / largest, lost / largest)
    return VerifiedMap(input_shape, stage, tuple(got.shape), *errors, problem)


def _rule(dtype: torch.dtype, rel: float) -> str:
    if dtype in (torch.float32, torch.float64):
        allowed = f"{rel * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps:.2g}"
    else:
        allowed = f"twice what the reference loses in {_dtype_name(dtype)}, plus half a unit"
    return (
        f"from the reference in float64 at most {allowed}; relative to the largest value of a map"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
