"""Calls of an accelerated host: requests, odd inputs, transforms, wrong or slow replacements."""

import inspect
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import images
from tiny_hosts import (
    NO_ACCELERATE_WARNING,
    PIXELS,
    accelerated,
    assert_bit_equal,
    assert_close,
    assert_ours_ran,
    infer,
    maskformer_swin,
    reasons_of,
    resnet_backbone,
    swin_backbone,
    swin_classifier,
    tensors,
    timm_resnet,
    torchvision_swin,
)
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fastbb
from fastbb.hosts.accelerate import AccelerateWarning
from fastbb.hosts.replacement import replacement_of
from fastbb.hosts.swin import TransformersSwinBlock

pytestmark = NO_ACCELERATE_WARNING
TRANSFORMERS = [swin_classifier, swin_backbone, maskformer_swin, resnet_backbone]


def assert_alike(got: Any, want: Any) -> None:
    """Asserts close tensors in the same containers, and equal other values."""
    (ours, spec), (theirs, upstream_spec) = tree_flatten(got), tree_flatten(want)
    assert type(got) is type(want) and spec == upstream_spec
    for a, b in zip(ours, theirs):
        assert isinstance(b, Tensor) or a == b
        assert not isinstance(b, Tensor) or a.is_contiguous() == b.is_contiguous()
    assert_close(tensors(got), tensors(want))


def assert_same_outcome(model: Any, twin: Any, *args: Any, **kwargs: Any) -> None:
    """Asserts the same result or the same error."""
    try:
        want = twin(*args, **kwargs)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            model(*args, **kwargs)
        assert type(raised.value) is type(error) and str(raised.value) == str(error)
        return
    got = model(*args, **kwargs)
    if args[0].is_meta:
        got, want = ([x.shape for x in tensors(result)] for result in (got, want))
        assert got == want
    else:
        assert_alike(got, want)


# requested outputs

REQUESTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "hidden_states": {"output_hidden_states": True},
    "no_hidden_states": {"output_hidden_states": False},
    "attentions": {"output_attentions": True},
    "both": {"output_attentions": True, "output_hidden_states": True},
    "tuple": {"return_dict": False},
    "dict": {"return_dict": True},
    "default": {"return_dict": None},
    "tuple-hidden_states": {"return_dict": False, "output_hidden_states": True},
}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", TRANSFORMERS)
def test_requested_outputs_equal_upstream(make: Callable[..., Any], attention: str) -> None:
    """Runs all requests in a row, twice: the outputs of one request must not leak into another."""
    takes = make in (swin_classifier, swin_backbone)
    options = {"attn_implementation": attention} if takes else {}
    model, twin, report = accelerated(lambda: make(**options))
    for name, request in [*REQUESTS.items()] * 2:
        if "attentions" in str(request) and make is resnet_backbone:
            continue
        got, want = (either(PIXELS, **request) for either in (model, twin))
        assert_alike(got, want)
        if name in ("attentions", "both"):  # upstream's own
            assert_bit_equal(tensors(got), tensors(want))
    model(PIXELS)
    assert_ours_ran(report)


CONFIGS = [{"output_hidden_states": True}, {"return_dict": False}, {"output_attentions": True}]


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("make", TRANSFORMERS)
def test_outputs_requested_by_the_configuration_equal_upstream(
    make: Callable[..., Any], config: dict[str, bool]
) -> None:
    takes = make in (swin_classifier, swin_backbone)
    options = {"attn_implementation": "eager"} if takes else {}
    model, twin, report = accelerated(lambda: make(**options))
    model(PIXELS)
    for change in (config, {name: not value for name, value in config.items()}):
        for either in (model, twin):
            for name, value in change.items():
                setattr(either.config, name, value)
        try:
            want = twin(PIXELS)
        except Exception as error:
            with pytest.raises(type(error)):
                model(PIXELS)
        else:
            assert_alike(model(PIXELS), want)
            assert_alike(model(PIXELS, return_dict=True), twin(PIXELS, return_dict=True))
            assert_alike(model(PIXELS), want)
    assert_ours_ran(report)


@torch.no_grad()
@pytest.mark.parametrize("make", TRANSFORMERS[1:])
def test_out_indices_set_later_equal_upstream(make: Callable[..., Any]) -> None:
    model, twin, report = accelerated(make)
    for indices in ([0, 1, 2], [2], [1, 2], [0, 1, 2]):
        for either in (model, twin):
            either.out_indices = indices
        for _ in range(2):
            assert_alike(model(PIXELS), twin(PIXELS))
    assert_ours_ran(report)


@pytest.mark.parametrize("make", [swin_backbone, resnet_backbone])
def test_out_indices_set_later_apply_to_a_bf16_copy(make: Callable[..., Any]) -> None:
    model, twin, report = accelerated(make, precision="bf16")
    infer(model)
    model.out_indices = twin.out_indices = [2]
    got, want = infer(model), infer(twin)
    assert_equals_upstream(got, want, rel=6e-2)  # of bf16 through a whole backbone
    assert not torch.equal(got[0], want[0]) and got[0].dtype == torch.float32
    assert_ours_ran(report)


@torch.no_grad()
def test_other_forward_methods_equal_upstream() -> None:
    model, twin, report = accelerated(timm_resnet)
    for _ in range(2):
        for method in ("forward_features", "forward", "forward_intermediates", "forward"):
            assert_alike(getattr(model, method)(PIXELS), getattr(twin, method)(PIXELS))
    assert_ours_ran(report)


def test_methods_keep_their_signatures(make: Callable[[], Any]) -> None:
    model, twin, _ = accelerated(make)
    for ours, theirs in zip(model.modules(), twin.modules()):
        if replacement_of(ours):
            assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    for name in ("forward_features", "forward_intermediates"):
        assert hasattr(model, name) == hasattr(twin, name)


# odd inputs

INPUTS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "double": lambda: ((PIXELS.double(),), {}),
    "half": lambda: ((PIXELS.half(),), {}),
    "integer": lambda: ((PIXELS.to(torch.uint8),), {}),
    "complex": lambda: ((PIXELS.to(torch.complex64),), {}),
    "channels": lambda: ((images(32, 32, channels=4),), {}),
    "three_dims": lambda: ((PIXELS[0],), {}),
    "five_dims": lambda: ((PIXELS[None],), {}),
    "tiny": lambda: ((PIXELS[..., :1, :1],), {}),
    "odd": lambda: ((images(37, 41),), {}),
    "no_pixels": lambda: ((PIXELS[..., :0],), {}),
    "no_images": lambda: ((PIXELS[:0],), {}),
    "meta": lambda: ((PIXELS.to("meta"),), {}),
    "none": lambda: ((None,), {}),
    "nothing": lambda: ((), {}),
    "text": lambda: (("pixels",), {}),
    "list": lambda: (([PIXELS],), {}),
    "unknown": lambda: ((PIXELS,), {"unknown": 1}),
    "twice": lambda: ((PIXELS,), {"pixel_values": PIXELS, "x": PIXELS}),
    "transposed": lambda: ((PIXELS.transpose(2, 3),), {}),
    "channels_last": lambda: ((PIXELS.to(memory_format=torch.channels_last),), {}),
    "view": lambda: ((images(40, 40)[:, :, 3:35, 5:37],), {}),
}


@torch.no_grad()
@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS)
def test_odd_inputs_have_the_outcome_of_upstream(make: Callable[[], Any], given: Any) -> None:
    model, twin, _ = accelerated(make)
    args, kwargs = given()
    for _ in range(2):  # at first before ours ran
        assert_same_outcome(model, twin, *args, **kwargs)
        assert_same_outcome(model, twin, PIXELS)  # tiny images change windows permanently


@torch.no_grad()
def test_wrong_input_after_many_sizes_raises_upstreams_error(make: Callable[[], Any]) -> None:
    model, twin, report = accelerated(make)
    for size in range(32, 76, 4):  # more forms of call than are checked
        pixels = images(size, 32, batch=1)
        assert_alike(model(pixels), twin(pixels))
    for pixels in (images(32, 32, channels=4), PIXELS[0]):
        with pytest.raises(Exception) as expected:
            twin(pixels)
        with pytest.raises(expected.type):
            model(pixels)
    assert_ours_ran(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["", "first"])
def test_nan_and_infinite_pixels_equal_upstream(
    make: Callable[[], Any], first: bool, value: float
) -> None:
    model, twin, report = accelerated(make)
    pixels = PIXELS.clone()
    pixels[1, 0, 3, 4] = value
    if not first:
        infer(model)
    got, want = infer(model, pixels), infer(twin, pixels)
    for ours, theirs in zip(got, want):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        assert theirs[0].isfinite().all() and not theirs.isfinite().all()
        assert_close([ours.where(theirs.isfinite(), 0)], [theirs.where(theirs.isfinite(), 0)])
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


# transforms of torch.func


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functional_transforms_equal_upstream(make: Callable[[], Any]) -> None:
    model, twin, report = accelerated(make)
    infer(model)
    other = {name: 0.7 * p.detach() for name, p in twin.named_parameters()}
    of_parameters: Any = {name: nn.Parameter(p) for name, p in other.items()}
    for parameters in (other, of_parameters):
        with torch.no_grad():
            call = torch.func.functional_call
            want = tensors(call(twin, parameters, (PIXELS,)))
            assert_close(tensors(call(model, parameters, (PIXELS,))), want)
        assert_close(infer(model), infer(twin))

    def loss(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda pixels: torch.stack([x.square().mean() for x in tensors(model(pixels))]).sum()

    for either in (model, twin):
        either.requires_grad_(False)
    got, want = (torch.func.grad(loss(either))(PIXELS) for either in (model, twin))
    assert torch.equal(got, want) and want.any()
    with torch.no_grad():
        one = PIXELS[:, None]
        got, want = (torch.vmap(lambda x, m=m: loss(m)(x))(one) for m in (model, twin))
        assert torch.equal(got, want)
    assert any("a transform of torch.func" in why for why in reasons_of(report))
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


# faults of our replacement

BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "wrong": (
        lambda y, x: (1.01 * y[0], None),
        r"tensor 0 differs from upstream's: error 0\.\d+, allowed",
    ),
    "crashes": (lambda y, x: y[7], "IndexError: tuple index out of range"),
    "shape": (lambda y, x: (y[0][:, 1:], None), r"tensor 0 is \[2, 63, 8\] torch.float32 on cpu"),
    "dtype": (lambda y, x: (y[0].double(), None), r"tensor 0 is \[2, 64, 8\] torch.float64 on cpu"),
    "nan": (
        lambda y, x: (y[0] * float("nan"), None),
        "not finite where upstream's is",
    ),
    "none": (lambda y, x: (None, None), "it returned|'NoneType' object has no attribute"),
}
FIRST = "swin.encoder.layers.0.blocks.0"


def breaking(monkeypatch: pytest.MonkeyPatch, how: Callable[..., Any]) -> list[int]:
    """Makes our Swin blocks broken, and counts their calls."""
    own, calls = TransformersSwinBlock.forward, []

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return how(own(self, x, *args, **kwargs), x)

    monkeypatch.setattr(TransformersSwinBlock, "forward", forward)
    return calls


@pytest.mark.parametrize("how, why", BROKEN.values(), ids=BROKEN)
def test_a_wrong_replacement_is_off_with_one_warning(
    how: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = breaking(monkeypatch, how)
    model, twin, report = accelerated(swin_classifier, include=FIRST)
    with pytest.warns(AccelerateWarning, match=why) as warned:
        assert_bit_equal(infer(model), infer(twin))
    (warning,) = [w for w in warned if issubclass(w.category, AccelerateWarning)]
    assert str(warning.message).startswith(f"{FIRST} (SwinLayer) runs upstream's forward: ")
    for pixels in (PIXELS, images(64, 64)):
        assert_bit_equal(infer(model, pixels), infer(twin, pixels))
    assert len(calls) == 1
    (row,) = report.rows()
    assert row[:3] == (FIRST, "SwinLayer", "upstream") and row[3] in str(warning.message)
    assert fastbb.accelerate(model, mode="eager", include=FIRST).rows()[0][2] == "not decided"


def test_a_replacement_that_crashes_later_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, report = accelerated(swin_classifier)
    infer(model)
    assert_ours_ran(report)
    breaking(monkeypatch, lambda y, x: y[7])
    with pytest.warns(AccelerateWarning, match="IndexError") as warned:
        assert_close(infer(model), infer(twin))
    blocks = [w for w in warned if issubclass(w.category, AccelerateWarning)]
    assert len(blocks) == 3  # each names itself
    assert len({str(w.message) for w in blocks}) == 3
    assert_close(infer(model), infer(twin))
    assert {runs for _, was, runs, _ in report.rows() if was == "SwinLayer"} == {"upstream"}
    assert {runs for _, was, runs, _ in report.rows() if was == "SwinPatchMerging"} == {"fastbb"}


def test_a_wrong_whole_backbone_keeps_its_fast_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbb.hosts.swin import TransformersSwin

    own = TransformersSwin.tensors
    monkeypatch.setattr(
        TransformersSwin, "tensors", lambda self, x: tuple(1.01 * y for y in own(self, x))
    )
    model, twin, report = accelerated(swin_backbone)
    with pytest.warns(AccelerateWarning, match=r"the model \(SwinBackbone\) runs upstream's"):
        assert_bit_equal(infer(model), infer(twin))
    assert_close(infer(model), infer(twin))
    states = {(was, runs) for _, was, runs, _ in report.rows()}
    ours = {("SwinLayer", "fastbb"), ("SwinPatchMerging", "fastbb")}
    assert states == {("SwinBackbone", "upstream"), *ours}


def test_a_slow_replacement_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(y: Any, x: Tensor) -> Any:
        time.sleep(0.03)
        return y

    calls = breaking(monkeypatch, slow)
    model, twin, report = accelerated(swin_classifier, mode="auto", include=FIRST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_bit_equal(infer(model), infer(twin))
        n_measured = len(calls)
        assert_bit_equal(infer(model), infer(twin))
    assert len(calls) == n_measured > 1
    ((_, _, runs, why),) = report.rows()
    assert runs == "upstream" and why.startswith("ours 3") and ", upstream " in why


def test_the_error_is_upstreams_if_both_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin, report = accelerated(torchvision_swin)
    infer(model)
    for pixels in (PIXELS[:, :2], PIXELS[..., None]):
        with pytest.raises(RuntimeError) as expected:
            infer(twin, pixels)
        with pytest.raises(RuntimeError) as raised:
            infer(model, pixels)
        assert str(raised.value) == str(expected.value)
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)
