"""`fastbb bench --accelerate`: both ways to run hosts, their truth and traffic."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hosts import HOSTS, block_of
from torch import Tensor, nn

from fastbb.bench import host_models
from fastbb.bench.host_models import ACCELERATED, AS_IS
from fastbb.bench.hosts import HostRunner, HostSubject, make_runner
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
        judged = truth.judge(made.outputs(made.start()), 2)
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
    monkeypatch.setattr(host_models, "accelerate", wrong)
    made = runner(subject, ACCELERATED)
    judged = truth and truth.judge(made.outputs(made.start()), 2)
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
    for call in (made.start, made.run):  # the first call, and one after the warm-up
        assert truth.judge(made.outputs(call()), 2).wrong is None


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
    truth = subject.truth("fp32", 9)
    assert truth is not None and truth.exact.keys() == {"own"}
    assert subject.notes[0].startswith(
        "outputs that mix images of a batch: mixed: others are compared instead"
    )
    made = runner(subject, AS_IS, batch=9)
    assert truth.judge(made.outputs(made.start()), 9).wrong is None
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
    assert subject.notes[0].startswith(f"nothing is compared: {why}")
    assert "; accelerate() itself" in subject.notes[0]


def test_libraries_are_imported_before_memory_is_counted() -> None:
    def imports(name: str) -> list[str]:
        return HostSubject(name, SIZE).ways("fp32", 1, Path())[0].spec["imports"]

    found = imports(SWIN_HOST)
    assert found[0] == "torch._dynamo"
    assert "transformers.models.swin.modeling_swin" in found
    assert not [name for name in imports(f"{__name__}:mixing") if name == __name__]


def test_every_image_of_a_host_is_compared() -> None:
    subject = HostSubject(SWIN_HOST, SIZE)
    truth = subject.truth("fp32", 9)
    made = runner(subject, ACCELERATED, batch=9)
    outputs = made.outputs(made.start())
    assert truth is not None and len(truth.exact["logits"]) == 7 < len(outputs["logits"])
    assert truth.judge(outputs, 9).wrong is None
    outputs["logits"][5] += 1
    assert truth.judge(outputs, 9).wrong is not None


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
