"""`verify` passes backbones that equal upstream, and fails all others."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runner import cli_runner
from click.testing import Result
from reference_models import (
    Pair,
    hf_maskformer_swin,
    hf_pair,
    hf_resnet,
    hf_swin,
    images,
    timm_options,
    timm_pair,
    torchvision_pair,
    torchvision_swin,
)
from torch import Tensor, nn

from fastbb import AutoBackbone
from fastbb.backbone.base import Backbone
from fastbb.cli import main
from fastbb.inspect.verify import VerifyReport, random_images, verify
from fastbb_kernels.accuracy import FP32_REL, FP32_REL_FOLDED
from fastbb_kernels.fp32_precision import fp32_products

transformers = pytest.importorskip("transformers")

PAIRS: dict[str, Callable[[], Pair]] = {
    "transformers 5.*, SwinBackbone": lambda: hf_pair(hf_swin(image_size=64)),
    "transformers 5.*, MaskFormerSwinBackbone": lambda: hf_pair(hf_maskformer_swin(image_size=64)),
    "transformers 5.*, ResNetBackbone": lambda: hf_pair(hf_resnet()),
    "torchvision 0.*, SwinTransformer": lambda: torchvision_pair(torchvision_swin()),
    "timm 1.*, mobilenetv2_035": lambda: timm_pair("mobilenetv2_035"),
    "timm 1.*, swin_tiny_patch4_window7_224": lambda: timm_pair(
        timm_options("swin", "w7")[0], **timm_options("swin", "w7")[1]
    ),
}


def swin(**config: Any) -> Pair:
    return hf_pair(hf_swin(image_size=64, **config))


def wrong(report: VerifyReport) -> list[str]:
    return [row.stage for row in report.rows if not row.passed]


def change_map(backbone: Any, stage: str, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the map of one stage that a backbone returns."""
    original = backbone.feature_map

    def feature_map(name: str, hidden_state: Tensor, image_size: tuple[int, int]) -> Tensor:
        found = original(name, hidden_state, image_size)
        return change(found) if name == stage else found

    backbone.feature_map = feature_map


@pytest.mark.parametrize("name", PAIRS)
def test_backbone_that_equals_upstream_passes_at_two_sizes(name: str) -> None:
    backbone = PAIRS[name]().ours
    report = verify(backbone)
    assert report.passed, str(report)
    library, _, model = name.partition("*")
    assert report.reference.startswith(library) and report.reference.endswith(model)
    assert not report.notes
    stages = backbone.out_features
    assert [row.stage for row in report.rows] == stages * 2
    height, width = backbone.default_size
    first, second = (report.rows[i].input_shape for i in (0, len(stages)))
    assert first == (2, 3, height, width) and second[2] != second[3]
    for row, channels in zip(report.rows, backbone.channels * 2):
        assert row.shape[:2] == (2, channels) and 0 < row.error < row.allowed
    native = "mobilenet" not in name
    assert report.rows[0].allowed == pytest.approx(FP32_REL if native else FP32_REL_FOLDED)


def test_default_sizes_are_sizes_that_the_reference_takes() -> None:
    odd = verify(PAIRS["transformers 5.*, ResNetBackbone"]().ours).rows[-1].input_shape
    assert odd == (2, 3, 167, 197)
    name, options = timm_options("swin", "w7")
    even = verify(timm_pair(name, **options).ours).rows[-1].input_shape
    assert even == (2, 3, 160, 192)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_bf16_and_fp64_backbones_pass_and_their_wrong_maps_fail(dtype: torch.dtype) -> None:
    for name in ("transformers 5.*, SwinBackbone", "timm 1.*, mobilenetv2_035"):
        backbone = PAIRS[name]().ours.to(dtype)
        report = verify(backbone)
        assert report.passed, str(report)
        assert str(dtype).removeprefix("torch.") in str(report).splitlines()[0]
    # eager's own error is half of the allowed one; a tenth of the map is far more
    backbone = swin().ours.to(dtype)
    change_map(backbone, "stage4", lambda x: x * 1.1)
    assert wrong(verify(backbone)) == ["stage4"] * 2


@pytest.mark.parametrize(
    "change",
    [lambda x: x * 1.001, lambda x: x.index_fill(3, torch.tensor([1]), torch.nan), lambda x: x.mT],
    ids=["scaled", "nan", "transposed"],
)
def test_one_wrong_map_is_one_wrong_row(change: Callable[[Tensor], Tensor]) -> None:
    backbone = swin().ours
    change_map(backbone, "stage2", change)
    report = verify(backbone, inputs=images(64, 64))
    assert wrong(report) == ["stage2"] and not report.passed
    first, *_, last = str(report).splitlines()
    assert first.endswith("1 of 5 maps are wrong")
    assert "WRONG" in str(report) and last.endswith("ok")


def test_another_shape_or_dtype_is_wrong() -> None:
    backbone = swin().ours
    change_map(backbone, "stage1", lambda x: x[..., :-1])
    change_map(backbone, "stage3", lambda x: x.bfloat16())
    report = verify(backbone, inputs=images(64, 64))
    assert wrong(report) == ["stage1", "stage3"]
    assert "WRONG: shape (2, 16, 16, 15), eager (2, 16, 16, 16)" in str(report)
    assert "WRONG: torch.bfloat16, eager torch.float32" in str(report)


@torch.no_grad()
def test_stale_derived_weight_is_found() -> None:
    backbone = swin().ours
    backbone(images(64, 64))
    backbone.swin.encoder.layers[1].blocks[0].attention.q_proj.weight.data.mul_(2)
    assert wrong(verify(backbone, inputs=images(64, 64))) == ["stage2", "stage3", "stage4"]
    backbone.refresh()
    assert verify(backbone, inputs=images(64, 64)).passed


def test_stale_folded_weight_is_found() -> None:
    backbone = timm_pair("mobilenetv2_035").ours
    backbone(images(64, 64))
    backbone._backbone.blocks[1][0].bn2.weight.data[3] *= 1.01
    with torch.no_grad():
        backbone(images(64, 64))
        backbone._backbone.blocks[1][0].bn2.weight.data[3] *= 1.01
        assert wrong(verify(backbone, inputs=images(64, 64)))[0] == "blocks.1"


class Wrapped(nn.Module):
    """A reference that returns a model's maps in another container."""

    def __init__(self, model: nn.Module, pack: Callable[[tuple[Tensor, ...]], Any]) -> None:
        super().__init__()
        self.model, self.pack, self.dropout = model, pack, nn.Dropout()

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.model(self.dropout(x)).feature_maps)


@pytest.mark.parametrize(
    "pack",
    [list, tuple, lambda m: dict(enumerate(m)), lambda m: SimpleNamespace(feature_maps=m)],
    ids=["list", "tuple", "dict", "feature_maps"],
)
def test_reference_module_of_the_user_is_compared(pack: Callable[[Any], Any]) -> None:
    pair = swin()
    reference = Wrapped(pair.upstream, pack).train()
    report = verify(pair.ours, reference)
    assert report.passed and report.reference == "Wrapped"
    assert all(module.training for module in reference.modules())
    model: Any = reference.model
    with torch.no_grad():
        model.swin.encoder.layers[2].blocks[0].mlp.fc1.bias[0] += 0.01
    assert wrong(verify(pair.ours, reference, images(64, 64))) == ["stage3", "stage4"]
    other = Wrapped(hf_swin("w8", image_size=64), pack)
    assert not verify(pair.ours, other, images(64, 64)).passed


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (lambda m: m[1:], "maps of stem, stage1, .* got 4 maps; `backbone.out_indices` chooses"),
        (lambda m: m[-1], "a list, tuple or dict of maps .*, got Tensor"),
        (lambda m: [*m[:-1], None], "a list, tuple or dict of maps .* got list"),
        (
            lambda m: [x.permute(0, 2, 3, 1) for x in m],
            r"return \[2, 16, 15, 16\] for stem, .* got \[2, 15, 16, 16\]",
        ),
    ],
    ids=["count", "tensor", "none", "nhwc"],
)
def test_reference_with_other_maps_raises_value_error(
    pack: Callable[[Any], Any], message: str
) -> None:
    pair = swin()
    with pytest.raises(ValueError, match=message):
        verify(pair.ours, Wrapped(pair.upstream, pack), images(60, 64))
    with pytest.raises(ValueError, match="reference must be 'auto' or a module, got 'upstream'"):
        verify(pair.ours, "upstream")


def test_inexact_reference_allows_twice_its_error() -> None:
    pair = swin()

    def inexact(error: float) -> nn.Module:
        return Wrapped(
            pair.upstream,
            lambda maps: [m if m.dtype == torch.float64 else m * (1 + error) for m in maps],
        )

    change_map(pair.ours, "stage4", lambda x: x * 1.001)
    report = verify(pair.ours, inexact(6e-4), images(64, 64))
    assert report.passed and "loses more than 1e-05" in report.notes[0]
    assert report.rows[-1].allowed == pytest.approx(1.2e-3, rel=0.01)
    assert wrong(verify(pair.ours, inexact(4e-4), images(64, 64))) == ["stage4"]


def test_nonfinite_reference_fails_every_map() -> None:
    pair = swin()
    reference = Wrapped(
        pair.upstream, lambda maps: [m if m.dtype == torch.float64 else m * torch.inf for m in maps]
    )
    report = verify(pair.ours, reference, images(64, 64))
    assert len(wrong(report)) == 5 and "itself is not finite in float32" in str(report)


class Recorder(nn.Module):
    """A reference that records the fp32 precision it runs in."""

    seen: list[str] = []

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        self.seen.append(f"{x.dtype} {torch.get_float32_matmul_precision()}")
        return self.model(x)


def test_reference_runs_in_the_precision_of_the_prepared_backbone() -> None:
    pair = swin()
    prepared = pair.ours.prepare(mode="eager", precision="fp32")
    with fp32_products("tf32"):
        assert verify(prepared, Recorder(pair.upstream), images(64, 64)).passed
    assert Recorder.seen[0] == "torch.float32 highest"


def scaled(run: Callable[[Tensor], Sequence[Tensor]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def wrong_run(pixels: Tensor) -> tuple[Tensor, ...]:
        *maps, last = run(pixels)
        return (*maps, last * 1.1)

    return wrong_run


@pytest.mark.parametrize("precision", [None, "bf16"], ids=str)
def test_prepared_backbone_passes_and_its_wrong_maps_fail(
    precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(PAIRS)[2:5]:
        pair = PAIRS[name]()
        prepared = pair.ours.prepare(mode="eager", precision=precision)
        report = prepared.verify(inputs=[images(64, 64), images(47, 52)])
        assert report.passed, str(report)
        engine = prepared._engine
        assert engine is not None
        engine.reset()
        ways = engine.chooser.ways
        monkeypatch.setattr(ways, "eager", scaled(ways.eager))
        assert wrong(prepared.verify(inputs=images(64, 64))) == [prepared.out_features[-1]]


def test_config_that_the_library_cannot_express_uses_our_own_reference() -> None:
    backbone = torchvision_pair(torchvision_swin()).ours
    backbone.config.layer_norm_eps = 1e-6
    again = type(backbone).from_config(backbone.config).eval()
    again.load_state_dict(backbone.state_dict())
    report = verify(again, inputs=images(64, 64))
    assert report.passed and "torchvision has no such Swin" in report.notes[0]


def test_selected_maps_pass_at_changing_sizes() -> None:
    for name in list(PAIRS)[:4]:
        backbone = PAIRS[name]().ours
        backbone.out_indices = [1, 3]
        pixels = [images(20, 24), images(96, 64), images(20, 24)]
        report = verify(backbone, inputs=pixels)
        assert report.passed, str(report)
        assert [row.stage for row in report.rows] == ["stage1", "stage3"] * 3
    backbone = PAIRS["timm 1.*, mobilenetv2_035"]().ours
    backbone.out_indices = [-4, 3]
    assert verify(backbone, inputs=images(64, 64)).passed


@pytest.mark.parametrize("name", PAIRS)
def test_verify_leaves_backbone_pixels_and_random_state_unchanged(name: str) -> None:
    backbone = PAIRS[name]().ours
    backbone.config.return_dict = False
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    pixels, random_state = images(64, 64), torch.get_rng_state()
    copy = pixels.clone()
    calls: list[Any] = []
    hook = backbone.register_forward_hook(lambda *args: calls.append(args))
    with torch.inference_mode():
        assert verify(backbone, inputs=pixels).passed
    hook.remove()
    assert len(calls) == 1  # the reference is no copy of the backbone itself
    assert torch.equal(torch.get_rng_state(), random_state) and torch.equal(pixels, copy)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not any(module.training for module in backbone.modules())
    assert verify(backbone, inputs=pixels).passed


def test_training_mode_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r"call backbone.eval\(\) first"):
        verify(swin().ours.train())


@pytest.mark.parametrize("inputs", [[], "photo.jpg", 3, [images(8, 8), None]], ids=repr)
def test_inputs_that_are_no_images_raise_value_error(inputs: Any) -> None:
    with pytest.raises(ValueError, match="images .B, C, H, W. or a list of such tensors, got"):
        verify(AutoBackbone.from_pretrained("nano-swin-digits"), inputs=inputs)
    with pytest.raises(ValueError, match="Expected 3 channels"):
        verify(AutoBackbone.from_pretrained("nano-swin-digits"), inputs=images(8, 8, channels=1))


def test_random_images_look_like_normalized_photos() -> None:
    backbone = swin().ours
    pixels = random_images(backbone, (64, 96), batch=3)
    assert torch.equal(pixels, random_images(backbone, (64, 96), batch=3))
    assert not torch.equal(pixels[0], pixels[1])
    for image in pixels:
        assert image.mean().abs() < 1e-5 and abs(image.std() - 1) < 1e-3
    # neighbours are alike
    assert (pixels[..., 1:] - pixels[..., :-1]).std() < 0.6


def command(*arguments: Any) -> Result:
    return cli_runner().invoke(main, ["verify-model", *map(str, arguments)])


def test_verify_command_prints_results_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    result = command("nano-swin-digits")
    assert result.exit_code == 0, result.output
    assert "SwinBackbone: passed" in result.stdout and "2x3x47x57  stage4" in result.stdout
    result = command(
        *("nano-resnet-digits", "--size", "32x40", "--size", "21x20", "--batch", 3),
        *("--precision", "bf16", "--device", "cpu", "--out-indices", "1,-1"),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ResNetBackbone in bfloat16 on cpu against transformers 5")
    assert [line.split()[:2] for line in result.stdout.splitlines()[3:]] == [
        ["3x3x32x40", "stage1"],
        ["3x3x32x40", "stage4"],
        ["3x3x21x20", "stage1"],
        ["3x3x21x20", "stage4"],
    ]
    monkeypatch.setattr(Backbone, "feature_map", lambda self, stage, x, size: x * 1.001)
    result = command("nano-resnet-digits", "--size", "32x32")
    assert result.exit_code == 1 and "1 of 1 maps are wrong" in result.stdout


def test_verify_command_prepares_in_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def prepare(self: Backbone, **options: Any) -> Backbone:
        calls.append(options)
        return self.to(torch.bfloat16)

    monkeypatch.setattr(Backbone, "prepare", prepare, raising=False)
    result = command("nano-swin-digits", "--mode", "eager", "--precision", "bf16", "--batch", 1)
    assert result.exit_code == 0 and "in bfloat16" in result.stdout
    assert calls == [{"mode": "eager", "precision": "bf16", "example": (1, 64, 64)}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((".",), "has no config.json"),
        (("nano-swin-digits", "--device", "gpu"), "wanted cpu, cuda or cuda:N, got 'gpu'"),
        (("nano-swin-digits", "--out-indices", "9"), "out_indices must be valid indices"),
        (("nano-swin-digits", "--size", "64"), "such as 224x224, got '64'"),
        (("nano-swin-digits", "--mode", "fast"), "'fast' is not one of"),
    ],
    ids=["name", "device", "out_indices", "size", "mode"],
)
def test_wrong_arguments_of_the_command_exit_with_2(
    arguments: tuple[str, ...], message: str
) -> None:
    result = command(*arguments)
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " ")
