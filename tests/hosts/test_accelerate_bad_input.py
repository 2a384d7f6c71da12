"""Arguments that `accelerate` refuses with a reason, in full or in part."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed
from tiny_hosts import (
    NO_ACCELERATE_WARNING,
    PIXELS,
    assert_bit_equal,
    assert_close,
    assert_ours_ran,
    block_of,
    has_run_ours,
    infer,
    maskformer_swin,
    reasons_of,
    swin_backbone,
    swin_classifier,
    timm_resnet,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fastbb
from fastbb.hosts.replacement import replacement_of

pytestmark = NO_ACCELERATE_WARNING


def accelerate_in_vain(model: nn.Module, why: str, **options: Any) -> fastbb.AccelerateReport:
    """Returns the report on a model of which nothing is accelerated, after one warning."""
    with pytest.warns(fastbb.AccelerateWarning, match=f"^nothing in .* is accelerated: .*{why}"):
        report = fastbb.accelerate(model, **{"mode": "eager", **options})
    assert not report.replaced
    return report


def is_untouched(model: nn.Module) -> bool:
    return not any(replacement_of(m) or "forward" in vars(m) for m in model.modules())


# odd inputs


def test_model_without_a_known_backbone_is_left_unchanged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    report = accelerate_in_vain(model, "there is no backbone that fastbb makes faster$")
    assert report.accelerated == [] and report.rows() == []
    assert str(report).endswith("there is no backbone that fastbb makes faster")
    with pytest.raises(ValueError, match="there is no backbone that fastbb makes faster"):
        fastbb.accelerate(model, strict=True)
    assert is_untouched(model)
    fastbb.restore(model)


class Pipeline:
    def __init__(self) -> None:
        self.model = swin_classifier()


GIVEN = [Pipeline(), "resnet50", None, swin_classifier]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: type(given).__name__)
def test_a_non_module_is_a_type_error(given: Any) -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module, got \w+; of a pipeline"):
        fastbb.accelerate(given)


@pytest.mark.parametrize("mode", ["fast", "", None])
def test_unknown_mode_raises_value_error(mode: Any) -> None:
    model = swin_classifier()
    with pytest.raises(ValueError, match="mode"):
        fastbb.accelerate(model, mode=mode)
    assert is_untouched(model)


@pytest.mark.parametrize("mode", ["triton", "triton+compile"])
def test_triton_mode_on_a_cpu_raises_value_error(mode: str) -> None:
    model = swin_classifier()
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, the model is on cpu"):
        fastbb.accelerate(model, mode=mode)
    assert is_untouched(model)


@pytest.mark.parametrize("precision", ["int8", torch.float16, "tf32"], ids=str)
def test_unknown_or_gpu_only_precision_raises_value_error(precision: Any) -> None:
    model = swin_backbone()
    with pytest.raises(ValueError, match="precision"):
        fastbb.accelerate(model, precision=precision)
    assert is_untouched(model)


def test_precision_without_a_whole_backbone_is_reported() -> None:
    model = nn.Sequential(block_of(timm_resnet()))
    report = fastbb.accelerate(model, precision="bf16")
    assert "is for whole backbones" in report.left_alone[-1].why


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["layerr1", ["layer1", "nothing.*"]], ids=str)
def test_names_that_match_no_module_are_refused(option: str, pattern: Any) -> None:
    model = timm_resnet()
    fastbb.accelerate(model, mode="eager")
    with pytest.raises(ValueError, match=rf"{option}: no module is called '(layerr1|nothing\.\*)'"):
        fastbb.accelerate(model, **{option: pattern})
    assert_close(infer(model), infer(timm_resnet()))
    assert has_run_ours(model)  # as before


CHOSEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "include": ({"include": "layer1"}, ["layer1.0", "layer1.1"]),
    "wildcard": ({"include": "layer[34].*"}, ["layer3.0", "layer4.0"]),
    "several": ({"include": ["layer1.1", "layer4"]}, ["layer1.1", "layer4.0"]),
    "exclude": (
        {"exclude": ["layer1", "layer2.*"]},
        ["", "layer3.0", "layer4.0"],
    ),
    "both": ({"include": "layer1", "exclude": "*.0"}, ["layer1.1"]),
    "nothing": ({"exclude": "*"}, []),
}


@pytest.mark.parametrize("options, names", CHOSEN.values(), ids=CHOSEN)
def test_include_and_exclude_select_modules(options: dict[str, Any], names: list[str]) -> None:
    model = timm_resnet()
    run = fastbb.accelerate if names else partial(accelerate_in_vain, why="no backbone")
    report = run(model, mode="eager", **options)
    assert report.accelerated == names
    assert_close(infer(model), infer(timm_resnet()))
    if names:
        assert_ours_ran(report)


def test_strict_leaves_a_model_as_it_was() -> None:
    model = timm_resnet()
    model.layer2[0] = torch.jit.trace(model.layer2[0], torch.zeros(1, 8, 8, 8))
    with pytest.raises(ValueError, match="strict=True") as raised:
        fastbb.accelerate(model, mode="eager", strict=True)
    assert "layer2.0" in str(raised.value) and "it is scripted" in str(raised.value)
    assert is_untouched(model)
    report = fastbb.accelerate(timm_resnet(), mode="eager", strict=True)
    assert not report.left_alone


# modules that are compiled, scripted or traced


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


CLOSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "compiled": (lambda model: torch.compile(model, backend="eager"), "it is compiled"),
    "compiled_in_place": (compiled_in_place, "it is compiled"),
    "scripted": (lambda model: torch.jit.trace(model, PIXELS), "it is scripted"),
    "fx": (torch.fx.symbolic_trace, "it is a traced graph"),
    "DataParallel": (nn.DataParallel, "DataParallel copies modules without"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["", "inside"])
@pytest.mark.parametrize("close, why", CLOSED.values(), ids=CLOSED)
def test_compiled_scripted_and_traced_modules_are_left_alone(
    close: Any, why: str, inside: bool
) -> None:
    twin = timm_resnet()
    closed = close(timm_resnet())
    model = nn.Sequential(closed) if inside else closed
    report = accelerate_in_vain(model, why)
    (left,) = report.left_alone
    assert left.name == ("0" if inside else "") and why in left.why
    assert why in str(report)
    assert_bit_equal(infer(model), infer(twin))


@pytest.mark.parametrize("make", [swin_classifier, timm_resnet])
def test_weights_on_the_meta_device_are_left_alone_until_loaded(make: Callable[[], Any]) -> None:
    model = make().to("meta")
    report = accelerate_in_vain(model, "its weights are on the meta device")
    assert {left.why for left in report.left_alone} == {
        "its weights are on the meta device: load them first"
    }
    model.load_state_dict(make().state_dict(), assign=True)
    for name, buffer in make().named_buffers():  # buffers outside the state dict
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._buffers[own] = buffer
    report = fastbb.accelerate(model, mode="eager")
    assert_close(infer(model), infer(make()))
    assert_ours_ran(report)


def test_fake_tensors_and_meta_weights_run_upstreams_forward(make: Callable[[], Any]) -> None:
    model = make()
    report = fastbb.accelerate(model, mode="eager")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model(mode.from_tensor(PIXELS))
    assert any("fake tensors" in why for why in reasons_of(report))
    infer(model)
    assert_ours_ran(report)
    model.to("meta")
    with torch.no_grad():
        model(PIXELS.to("meta"))
    assert "it is on the meta device" in reasons_of(report)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", [swin_classifier, swin_backbone, maskformer_swin])
def test_quantized_linears_run_upstreams_forward(make: Callable[[], Any]) -> None:
    """Uses torch.ao, which copies the model."""

    def quantized(model: Any) -> Any:
        quantize = torch.ao.quantization.quantize_dynamic
        return quantize(model, {nn.Linear}, dtype=torch.qint8).eval()

    model = make()
    fastbb.accelerate(model, mode="eager")
    infer(model)
    want = infer(quantized(make()))
    after = quantized(model)
    before = quantized(make())
    report = accelerate_in_vain(before, "a Linear is inside it")
    assert report.left_alone
    for got in (after, before):
        assert_bit_equal(infer(got), want)
    assert_close(infer(model), infer(make()))
    assert has_run_ours(model) and not has_run_ours(after)


def test_backbone_used_in_two_places_is_accelerated_once() -> None:
    class Siamese(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.left = self.right = backbone

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.left(x), self.right(x.flip(-1))])

    model, twin = Siamese(timm_resnet()).eval(), Siamese(timm_resnet()).eval()
    report = fastbb.accelerate(model, mode="eager")
    assert report.accelerated[0] == "left" and not any("right" in n for n in report.accelerated)
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)
    with pytest.raises(ValueError, match="no module is called 'right'"):
        fastbb.accelerate(model, include="right")
    fastbb.restore(model)
    assert is_untouched(model)


def test_distributed_data_parallel_equals_upstream(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        inside, twin = timm_resnet(), timm_resnet()
        fastbb.accelerate(inside, mode="eager")
        around = nn.parallel.DistributedDataParallel(timm_resnet()).eval()
        report = fastbb.accelerate(around, mode="eager")
        assert report.accelerated[0] == "module"
        for model in (nn.parallel.DistributedDataParallel(inside).eval(), around):
            assert_close(infer(model), infer(twin))
            model.train()(PIXELS).sum().backward()
            twin.train()(PIXELS).sum().backward()
            got, want = ([p.grad for p in m.parameters()] for m in (model, twin))
            assert all(map(torch.equal, got, want))  # type: ignore[arg-type]
            twin = timm_resnet()
        assert has_run_ours(inside) and has_run_ours(around)
    finally:
        torch.distributed.destroy_process_group()


def test_accelerating_twice_and_restoring_equal_upstream(make: Callable[[], Any]) -> None:
    model, twin = make(), make()
    first = fastbb.accelerate(model, mode="eager")
    infer(model)
    second = fastbb.accelerate(model, mode="auto")
    assert first.accelerated == second.accelerated
    assert_close(infer(model), infer(twin))
    assert {replacement_of(r.module) for r in second.replaced} == set(second.replaced)
    block = fastbb.accelerate(block_of(model), mode="eager")  # a part of it
    assert block.accelerated == [""]
    assert_close(infer(model), infer(twin))
    for _ in range(2):
        fastbb.restore(model)
        assert is_untouched(model)
        assert_bit_equal(infer(model), infer(twin))
