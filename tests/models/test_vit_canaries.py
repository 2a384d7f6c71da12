"""Bugs that ViTs are prone to: the comparison with upstream catches each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import from_hf, images
from tolerance import assert_equals_upstream
from torch import Tensor
from torch.nn import functional as F
from vit_models import hf_vit

from fastbb.models import vit, vit_forward, vit_positions

pytest.importorskip("transformers")


def half_a_pixel_off(*args: Any, **options: Any) -> Tensor:
    return interpolate(*args, **{**options, "align_corners": True, "antialias": False})


def class_token_in_the_map(*args: Any, **options: Any) -> list[Tensor]:
    return [tokens.roll(1, dims=1) for tokens in states(*args, **options)]


def scale_after_the_residual(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, spec: Any
) -> Tensor:
    return scale * (residual + F.linear(x, weight, bias))


def prefix_rotated(x: Tensor, *args: Any, n_prefix: int, **options: Any) -> Tensor:
    qkv = rope_qkv(x.roll(-n_prefix, dims=1), *args, n_prefix=n_prefix, **options)
    return qkv.roll(n_prefix, dims=1)


def registers_with_positions(x: Tensor, prefix: Tensor, positions: Tensor) -> Tensor:
    return with_prefix(x, prefix + positions[:, : prefix.shape[1]], positions)


interpolate, states = F.interpolate, vit_forward.vit_states
rope_qkv, with_prefix = vit_forward.rope_qkv, vit_positions.with_prefix

BUGS: dict[Callable[..., Any], tuple[str, Any, str]] = {
    half_a_pixel_off: ("dinov2", vit_positions.F, "interpolate"),
    class_token_in_the_map: ("dinov2", vit, "vit_states"),
    scale_after_the_residual: ("dinov2", vit_forward, "_add_branch"),
    prefix_rotated: ("dinov3_vit", vit_forward, "rope_qkv"),
    registers_with_positions: ("dinov2_with_registers", vit_forward, "with_prefix"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@torch.no_grad()
def test_a_bug_is_caught(bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, module, name = BUGS[bug]
    monkeypatch.setattr(vit_forward, "runs_on_cpu", lambda *_: False)  # the ops run
    upstream, pixels = hf_vit(kind), images(28, 42)
    want = upstream(pixels).feature_maps
    assert_equals_upstream(from_hf(upstream)(pixels).feature_maps, want)
    monkeypatch.setattr(module, name, bug)
    with pytest.raises(AssertionError, match="differs by"):
        assert_equals_upstream(from_hf(upstream)(pixels).feature_maps, want)
