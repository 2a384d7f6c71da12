"""`fastbb bench --accelerate`: hosts by name, both ways to run them, their truth and traffic."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hosts import HOSTS, SWIN, block_of
from torch import Tensor, nn

from fastbb.bench import host_models, hosts
from fastbb.bench.host_models import build_host, default_size, make_inputs, named_outputs
from fastbb.bench.hosts import ACCELERATED, AS_IS, HostRunner, HostSubject, make_runner, outermost
from fastbb.bench.subject import SkippedError
from fastbb.bench.traffic import totals
from fastbb.hosts.accelerate import accelerate

SIZE = (32, 32)
SWIN_HOST = "tiny_hosts:swin_classifier"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """A worker runs without gradients."""
    with torch.no_grad():
        yield


def runner(subject: HostSubject, way: str, precision: str = "fp32", batch: int = 2) -> HostRunner:
    """The runner of a way, made from a spec that has passed JSON, and loaded."""
    (spec,) = [w.spec for w in subject.ways(precision, batch, Path()) if w.name == way]
    made = make_runner(json.loads(json.dumps(spec)))
    made.load()
    return made


# --- names


def write_config(folder: Path, **fields: Any) -> str:
    config = {"model_type": "swin", "architectures": ["SwinForImageClassification"], **SWIN}
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return str(folder)


def test_directory_with_a_configuration_is_its_class(tmp_path: Path) -> None:
    module = build_host(write_config(tmp_path), random_weights=True)
    assert type(module).__name__ == "SwinForImageClassification"
    assert not module.training and default_size(module) == SIZE


def test_directory_without_an_architecture_is_the_model(tmp_path: Path) -> None:
    module = build_host(write_config(tmp_path, architectures=None), random_weights=True)
    assert type(module).__name__ == "SwinModel"


def test_directory_with_weights_is_loaded(tmp_path: Path) -> None:
    made: Any = HOSTS["swin_classifier"]()
    made.save_pretrained(tmp_path)
    loaded = build_host(str(tmp_path), random_weights=False)
    weights = made.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in loaded.state_dict().items())


def test_class_of_transformers_has_its_default_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    class Tiny(transformers.ResNetConfig):
        def __init__(self, **fields: Any) -> None:
            super().__init__(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], **fields)

    monkeypatch.setattr(transformers.ResNetForImageClassification, "config_class", Tiny)
    module = build_host("ResNetForImageClassification", random_weights=True)
    assert sum(p.numel() for p in module.parameters()) < 100_000
    assert default_size(module) == (224, 224)


def test_timm_and_torchvision_names_are_whole_models() -> None:
    timm = build_host("resnet10t", random_weights=True)
    assert make_inputs(timm, 1, SIZE).call(timm).shape == (1, 1000)
    assert default_size(timm) == (176, 176)
    torchvision = build_host("torchvision/shufflenet_v2_x0_5", random_weights=True)
    assert make_inputs(torchvision, 1, SIZE).call(torchvision).shape == (1, 1000)


def test_function_of_the_working_directory_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_hosts.py").write_text(
        "from torch import nn\ndef mine():\n    return nn.Conv2d(3, 4, 3)\n"
        "def wrong():\n    return 3\ndef none():\n    raise KeyError('lost')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert isinstance(build_host("my_hosts:mine", random_weights=False), nn.Conv2d)
    with pytest.raises(ValueError, match="wanted a torch.nn.Module, got int"):
        build_host("my_hosts:wrong", random_weights=False)
    with pytest.raises(ValueError, match="my_hosts:none: it raises KeyError: 'lost'"):
        build_host("my_hosts:none", random_weights=False)
    with pytest.raises(ValueError, match="no function 'min'; it has mine"):
        build_host("my_hosts:min", random_weights=False)


def test_random_weights_are_the_same_every_time_and_leave_the_generator() -> None:
    before = torch.get_rng_state()
    first, second = (build_host("resnet10t", random_weights=True).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first["bn1.weight"], torch.ones_like(first["bn1.weight"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "nothing has this name; close names: .*resnet50"),
        ("SwinForImageClasification", "close names: .*SwinForImageClassification"),
        ("torchvision/resnet5O", "close names: .*torchvision/resnet50"),
        ("no_such_module_here:make", "cannot import no_such_module_here"),
        ("./no-such-directory", "wanted a directory or Hub name of transformers"),
        ("timm/no_such_model", "nothing has this name"),
        ("resnet18.nonexistent", "timm raises RuntimeError: .*nonexistent"),
        ("PreTrainedModel", "this class has no configuration of its own"),
        ("AutoModel", "this class has no configuration of its own"),
        ("", "--accelerate: wanted a directory or Hub name of .*, got ''"),
    ],
)
def test_wrong_name_says_what_was_wanted(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_host(name, random_weights=True)


def test_directory_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        build_host(str(tmp_path), random_weights=True)


def test_directory_of_another_library_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ValueError, match="wanted a directory or Hub name of transformers"):
        build_host(str(tmp_path), random_weights=True)


def test_class_without_random_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="a class has no weights; add --random-weights"):
        build_host("SwinForImageClassification", random_weights=False)


# --- inputs and outputs


def test_detection_takes_a_list_and_its_tensors_are_named_by_path() -> None:
    class Detector(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            assert isinstance(images, list)
            return [{"boxes": x.mean((1, 2)), "labels": torch.tensor([1])} for x in images]

    Detector.__module__ = "torchvision.models.detection.tiny"
    result = make_inputs(Detector(), 2, SIZE).call(Detector())
    assert named_outputs(result).keys() == {"0.boxes", "1.boxes"}
    assert default_size(Detector()) == (800, 1088)


def test_model_that_reads_text_gets_tokens_within_its_vocabulary() -> None:
    import transformers

    text = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {"image_size": 32, "patch_size": 16, **text}
    heads = {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, **heads, "eos_token_id": 98},
        vision_config={**vision, **heads},
        projection_dim=8,
    )
    module = transformers.CLIPModel(config).eval()
    outputs = named_outputs(make_inputs(module, 2, SIZE).call(module))
    assert outputs["logits_per_image"].shape == (2, 2)


def test_model_that_takes_no_images_is_an_error() -> None:
    import transformers

    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="BertModel takes no pixel_values"):
        make_inputs(transformers.BertModel(config), 1, SIZE)


def test_infinities_of_masks_are_no_difference_and_nan_is() -> None:
    masked = torch.tensor([float("-inf"), 1.0, float("nan")])
    assert named_outputs(masked)["output"].nan_to_num(7.0).tolist() == [0.0, 1.0, 7.0]


def test_outermost_modules_hold_no_other() -> None:
    assert outermost(["a", "a.b", "ab", "c.d", "c.d.e"]) == ["a", "ab", "c.d"]
    assert outermost(["", "a"]) == [""]


# --- both ways


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("host", HOSTS)
def test_both_ways_run_and_are_right(host: str, precision: str) -> None:
    subject = HostSubject(f"tiny_hosts:{host}", SIZE)
    truth = subject.truth(precision, 2)
    assert truth is not None and not subject.notes
    assert subject.params and subject.ways(precision, 2, Path())[0].name == subject.upstream
    for way in (AS_IS, ACCELERATED):
        made = runner(subject, way, precision)
        judged = truth.judge(made.outputs(made.start()))
        assert judged.wrong is None and judged.errors
        assert made.note.startswith("" if way == AS_IS else ("fastbb runs", "nothing runs"))


@pytest.mark.parametrize("way", [AS_IS, ACCELERATED])
def test_share_inside_is_a_part_of_the_whole(way: str) -> None:
    import time

    made = runner(HostSubject(SWIN_HOST, SIZE), way)
    made.start()
    made.inside_s()
    start = time.perf_counter()
    made.run()
    whole, inside = time.perf_counter() - start, made.inside_s()
    assert inside is not None and 0 < inside < whole
    assert made.inside_s() == 0


@pytest.mark.parametrize("host", ["swin_classifier", "timm_resnet"])
def test_hooks_that_time_change_nothing_that_runs(host: str) -> None:
    # the outermost replaced module is a block, or the whole model
    subject = HostSubject(f"tiny_hosts:{host}", SIZE)
    spec = {**subject.ways("fp32", 2, Path())[1].spec, "mode": "eager"}
    made = make_runner(spec)
    made.load()
    made.start()
    made.run()
    assert made.note.startswith("fastbb runs") and "hooks" not in made.note


def test_wrong_acceleration_is_judged_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: nn.Module, **options: Any) -> Any:
        report = accelerate(module, **options)
        block = block_of(module)
        right = block.forward
        block.forward = lambda *args, **kwargs: _more(right(*args, **kwargs))
        return report

    subject = HostSubject(SWIN_HOST, SIZE)
    truth = subject.truth("fp32", 2)
    monkeypatch.setattr(hosts, "accelerate", wrong)
    made = runner(subject, ACCELERATED)
    judged = truth and truth.judge(made.outputs(made.start()))
    assert judged is not None and judged.wrong is not None and "logits: error" in judged.wrong


def _more(result: Any) -> Any:
    return (_more(result[0]), *result[1:]) if isinstance(result, tuple) else 1.01 * result


class Jumpy(nn.Module):
    """A detector of sorts: its outputs are those of the best of many nearly equal scores."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = HOSTS["timm_resnet"](features_only=True)
        self.broken = False

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x: Tensor = self.backbone(pixels)[-1]
        if self.broken:
            raise TypeError("no such dtype here")
        noise = (1e9 * x.flatten(1)).sin()
        many = x.flatten()[noise.flatten() > 0]
        return {"chosen": noise, "many": many, "single": x.float(), "steady": x}


def jumpy() -> nn.Module:
    return Jumpy()


def broken() -> nn.Module:
    module = Jumpy()
    module.broken = True
    return module


def test_outputs_that_jump_are_left_out_and_the_backbone_is_compared() -> None:
    subject = HostSubject(f"{__name__}:jumpy", SIZE)
    truth = subject.truth("fp32", 2)
    assert truth is not None and truth.exact
    assert all(name.startswith("backbone") for name in truth.exact)
    assert subject.notes[0].startswith(
        "outputs that jump with a rounding: chosen, many; outputs that are never in float64: "
        "single: what the replaced modules return is compared instead; accelerate() itself"
    )
    made = runner(subject, ACCELERATED)
    assert truth.judge(made.outputs(made.start())).wrong is None


@pytest.mark.parametrize("way", [AS_IS, ACCELERATED])
def test_model_that_does_not_run_itself_is_skipped_with_its_error(way: str) -> None:
    subject = HostSubject(f"{__name__}:broken", SIZE)
    assert subject.truth("bf16", 1) is None and "no such dtype here" in subject.notes[0]
    with pytest.raises(SkippedError, match="itself does not run in bf16: TypeError: no such"):
        runner(subject, way, "bf16").start()


class Returns(nn.Module):
    """A model without a backbone, whose result a function makes from the pixels."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, pixels: Tensor) -> Any:
        return self.make(pixels)


def mixing() -> nn.Module:
    return Returns(lambda y: {"mixed": y - y.mean(0), "own": y})


def indices() -> nn.Module:
    return Returns(lambda y: y.flatten(1).argmax(1))


def single() -> nn.Module:
    return Returns(lambda y: y.float())


def test_outputs_that_mix_images_are_not_compared() -> None:
    subject = HostSubject(f"{__name__}:mixing", SIZE)
    truth = subject.truth("fp32", 6)
    assert truth is not None and truth.exact.keys() == {"own"}
    assert subject.notes[0].startswith(
        "outputs that mix images of a batch: mixed: others are compared instead"
    )
    made = runner(subject, AS_IS, batch=6)
    assert truth.judge(made.outputs(made.start())).wrong is None
    small = subject.truth("fp32", 4)  # the whole batch is checked
    assert small is not None and small.exact.keys() == {"mixed", "own"} and not subject.notes


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("indices", "it returns no floating tensors"),
        ("single", "outputs that are never in float64: output"),
        ("broken", "it raises TypeError: no such dtype here"),
    ],
)
def test_note_says_that_nothing_is_compared(host: str, why: str) -> None:
    subject = HostSubject(f"{__name__}:{host}", SIZE)
    assert subject.truth("fp32", 2) is None
    assert subject.notes[0].startswith(f"nothing is compared: {why}; accelerate() itself")


def test_libraries_are_imported_before_memory_is_counted() -> None:
    def imports(name: str) -> list[str]:
        return HostSubject(name, SIZE).ways("fp32", 1, Path())[0].spec["imports"]

    found = imports(SWIN_HOST)
    assert found[0] == "torch._dynamo"
    assert "transformers.models.swin.modeling_swin" in found
    assert not [name for name in imports(f"{__name__}:mixing") if name == __name__]


def test_more_images_than_are_checked_are_compared_at_both_ends() -> None:
    subject = HostSubject(SWIN_HOST, SIZE)
    truth = subject.truth("fp32", 6)
    made = runner(subject, ACCELERATED, batch=6)
    outputs = made.outputs(made.start())
    assert truth is not None and len(truth.exact["logits"]) == 4 < len(outputs["logits"])
    assert truth.judge(outputs).wrong is None
    outputs["logits"][5] += 1
    assert truth.judge(outputs).wrong is not None


# --- traffic


def test_traffic_is_that_of_the_replaced_modules() -> None:
    found = totals(HostSubject(SWIN_HOST, SIZE).traffic(2).counts)
    assert 0 < found[ACCELERATED]["launches"] < found[AS_IS]["launches"]
    assert 0 < found[ACCELERATED]["bytes"] < found[AS_IS]["bytes"]


def test_traffic_needs_no_knowledge_of_the_head() -> None:
    subject = HostSubject(f"{__name__}:jumpy", SIZE)  # `sin` has no category
    assert "bytes" in totals(subject.traffic(1).counts)[AS_IS]


def test_host_without_a_backbone_has_the_reason() -> None:
    found = HostSubject("torch.nn:Identity", SIZE)
    assert found.traffic(1).counts == {ACCELERATED: "accelerate() replaces nothing in it"}
    made = runner(found, ACCELERATED)
    made.start()
    assert made.inside_s() is None and made.note.startswith("there is no backbone")


def test_builders_of_the_repository_are_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    find = host_models._of_function
    assert find("bench.hosts:upernet").__name__ == "upernet"
