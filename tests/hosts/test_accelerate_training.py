"""Training, copying, saving, compiling and exporting of an accelerated host: as upstream."""

import copy
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
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
    dinov2_backbone,
    has_run_ours,
    infer,
    maskformer_swin,
    reasons_of,
    resnet_backbone,
    swin_backbone,
    swin_classifier,
    tensors,
    timm_resnet,
    torchvision_swin,
    twin_of,
)
from torch import Tensor, nn

import fastbb
from fastbb import AccelerateReport

pytestmark = NO_ACCELERATE_WARNING


def accelerated_and_run(make: Callable[[], Any]) -> tuple[Any, Any, AccelerateReport]:
    """A host on which ours has run, upstream's model, and the report."""
    model, twin, report = accelerated(make)
    assert_close(infer(model), infer(twin_of(make, model)))
    assert_ours_ran(report)
    return model, twin, report


def trained(model: Any, pixels: Tensor = PIXELS) -> list[Tensor]:
    """Results, gradients and buffers of one forward and backward."""
    torch.manual_seed(5)  # seeds dropout and drop path
    model.zero_grad(set_to_none=True)
    results = tensors(model(pixels))
    torch.stack([result.square().mean() for result in results]).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    return [*results, *gradients, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_equal_upstream_bit_by_bit(make: Callable[[], Any], training: bool) -> None:
    model, twin, report = accelerated_and_run(make)
    for _ in range(2):
        got, want = (trained(either.train(training)) for either in (model, twin))
        assert_bit_equal(got, want)
    why = "training mode" if training else "a gradient is needed"
    assert all(why in reason for reason in reasons_of(report)) and reasons_of(report)
    model.eval()
    assert_close(infer(model), infer(twin_of(make, model)))
    assert_ours_ran(report)


def test_gradient_of_the_pixels_equals_upstream(make: Callable[[], Any]) -> None:
    model, twin, report = accelerated_and_run(make)
    got, want = [], []
    for either, gradients in ((model, got), (twin, want)):
        either.requires_grad_(False)
        pixels = PIXELS.clone().requires_grad_()
        tensors(either(pixels))[-1].square().mean().backward()
        gradients.append(pixels.grad)
    assert_bit_equal(got, want)
    assert any("a gradient is needed" in reason for reason in reasons_of(report))
    model(PIXELS)  # frozen weights need no gradient
    assert_ours_ran(report)


def test_a_layer_in_training_mode_runs_as_upstream(make: Callable[[], Any]) -> None:
    """A frozen backbone with one norm in training mode, as in fine-tuning."""
    model, twin, report = accelerated_and_run(make)
    for either in (model, twin):
        next(m for m in either.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)).train()
    before = [buffer.clone() for buffer in twin.buffers()]
    for _ in range(2):
        assert_close(infer(model), infer(twin))
    assert_bit_equal([*model.buffers(), PIXELS], [*twin.buffers(), PIXELS])
    if make in (resnet_backbone, timm_resnet):
        assert not all(map(torch.equal, before, twin.buffers()))
        assert any("training mode" in reason for reason in reasons_of(report))


DROPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "swin_classifier": (
        swin_classifier,
        {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3},
    ),
    "maskformer_swin": (maskformer_swin, {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.3}),
    "timm_resnet": (timm_resnet, {"drop_path_rate": 0.3, "drop_rate": 0.2}),
    "torchvision_swin": (
        torchvision_swin,
        {"dropout": 0.2, "attention_dropout": 0.2, "stochastic_depth_prob": 0.3},
    ),
}


@pytest.mark.parametrize("make_with, options", DROPS.values(), ids=DROPS)
def test_dropout_acts_in_training_only(make_with: Any, options: Any) -> None:
    model, twin, report = accelerated_and_run(lambda: make_with(**options))
    was = infer(twin)
    got, want = (trained(either.train()) for either in (model, twin))
    assert_bit_equal(got, want)
    assert not torch.allclose(got[0], was[0], rtol=1e-2)
    for either in (model, twin):
        either.eval()
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("make", [swin_classifier, swin_backbone, maskformer_swin])
def test_gradient_checkpointing_recomputes_and_equals_upstream(make: Callable[[], Any]) -> None:
    model, twin, report = accelerated_and_run(make)
    want = trained(twin.train())
    calls: dict[Any, list[int]] = {model: [], twin: []}
    handles = []
    norm_name = next(n for n, _ in model.named_modules() if n.endswith("layernorm_before"))
    for either in (model, twin):
        either.gradient_checkpointing_enable()
        norm = either.get_submodule(norm_name)
        handles.append(norm.register_forward_hook(lambda *_, of=calls[either]: of.append(1)))
    assert_bit_equal(trained(model.train()), want)
    assert_bit_equal(trained(twin), want)
    assert len(calls[model]) == len(calls[twin]) > 1
    for handle in handles:
        handle.remove()
    assert_close(infer(model.eval()), infer(twin.eval()))
    assert_ours_ran(report)


@pytest.mark.filterwarnings("ignore")
def test_autocast_runs_upstreams_forward(make: Callable[[], Any]) -> None:
    model, twin, report = accelerated_and_run(make)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = infer(model), infer(twin)
        assert_bit_equal(got, want)
        assert_bit_equal(trained(model), trained(twin))
    assert not torch.equal(got[-1].float(), infer(twin)[-1])
    with torch.autocast("cpu", torch.bfloat16):
        infer(model)
    assert all("autocast" in reason for reason in reasons_of(report)) and reasons_of(report)
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


# copies


def reloaded(model: Any, folder: Path) -> Any:
    if isinstance(model, type(swin_backbone())):
        pytest.skip("transformers hooks it with local functions, which cannot be pickled")
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES: dict[str, tuple[Callable[[Any, Path], Any], bool]] = {
    "deepcopy": (lambda model, _: copy.deepcopy(model), True),
    "deepcopy-not_run": (lambda model, _: copy.deepcopy(model), False),
    "deepcopy-twice": (lambda model, _: copy.deepcopy(copy.deepcopy([model]))[0], True),
    "pickle": (reloaded, True),
}


@pytest.mark.parametrize("make_copy, ran_before", COPIES.values(), ids=COPIES)
def test_copies_are_accelerated_and_independent(
    make: Callable[[], Any], make_copy: Any, ran_before: bool, tmp_path: Path
) -> None:
    if make is dinov2_backbone and make_copy is reloaded:
        pytest.skip("the hooks by which transformers captures hidden states cannot be pickled")
    model = make()
    fastbb.accelerate(model, mode="eager")
    before = infer(make())
    if ran_before:
        infer(model)
    other = make_copy(model, tmp_path)
    assert_close(infer(other), before)
    for changed, kept in ((model, other), (other, model)):
        want, before = infer(kept), infer(changed)
        with torch.no_grad():
            for p in changed.parameters():
                p.mul_(0.7)
        got = infer(changed)
        assert_close(got, infer(twin_of(make, changed)))
        assert not torch.equal(got[-1], before[-1])
        assert_bit_equal(infer(kept), want)
    assert has_run_ours(model) and has_run_ours(other)
    parts = {id(part) for part in model.modules()}
    assert not any(id(_owner(part)) in parts for part in other.modules())
    fastbb.restore(other)
    assert_bit_equal(infer(other), infer(twin_of(make, other)))
    assert has_run_ours(model) and not has_run_ours(other)
    assert not any("forward" in vars(part) for part in other.modules())


def _owner(module: Any) -> Any:
    """The module that the forward on an instance computes with."""
    own = getattr(vars(module).get("forward"), "__self__", None)
    return getattr(own, "module", getattr(own, "conv", None))


def test_copy_that_has_not_run_can_be_restored(make: Callable[[], Any]) -> None:
    model, twin, _ = accelerated_and_run(make)
    other = copy.deepcopy(model)
    fastbb.restore(other)
    assert not any("forward" in vars(part) for part in other.modules())
    assert_bit_equal(infer(other), infer(twin))
    report = fastbb.accelerate(other, mode="eager")
    assert_close(infer(other), infer(twin))
    assert_ours_ran(report)


def test_shallow_copy_shares_weights_and_results(make: Callable[[], Any]) -> None:
    """A shallow copy shares parameters and layers with the original, so its results do too."""
    model, twin, _ = accelerated_and_run(make)
    other = copy.copy(model)
    assert_close(infer(other), infer(twin))
    for either in (other, twin):
        with torch.no_grad():
            for p in either.parameters():
                p.mul_(0.7)
    want = infer(twin)
    assert_close(infer(other), want)
    assert_close(infer(model), want)


# files

WITHOUT_FASTBB = """
import sys, torch, transformers
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastbb":
            raise ModuleNotFoundError("No module named 'fastbb'", name="fastbb")
sys.meta_path.insert(0, Refuse())
folder = sys.argv[1]
results = {}
for name in ("SwinForImageClassification", "SwinBackbone", "ResNetBackbone"):
    model, info = getattr(transformers, name).from_pretrained(
        f"{folder}/{name}", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        results[name] = list(model.eval()(torch.load(f"{folder}/pixels.pt"), return_dict=False))
try:
    torch.load(f"{folder}/pickled.pt", weights_only=False)
except ModuleNotFoundError as error:
    results["error"] = str(error)
assert "fastbb" not in sys.modules
torch.save(results, f"{folder}/results.pt")
"""


def test_saved_models_load_without_fastbb(tmp_path: Path) -> None:
    want = {}
    for make in (swin_classifier, swin_backbone, resnet_backbone):
        model, twin, _ = accelerated_and_run(make)
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        want[name] = infer(twin)
        written = (tmp_path / name / "config.json").read_text()
        twin.save_pretrained(tmp_path / "twin")
        assert "fastbb" not in written
        assert written == (tmp_path / "twin" / "config.json").read_text()
    torch.save(model, tmp_path / "pickled.pt")
    torch.save(PIXELS, tmp_path / "pixels.pt")
    command = [sys.executable, "-c", WITHOUT_FASTBB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "results.pt")
    # a pickle names its classes
    assert got.pop("error") == "No module named 'fastbb'"
    for name, results in got.items():
        assert_bit_equal(tensors(results), want[name])


def test_state_dicts_equal_upstream(make: Callable[[], Any], tmp_path: Path) -> None:
    model, twin, _ = accelerated_and_run(make)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")  # weights only
    assert list(state) == list(twin.state_dict()) == [*dict(make().state_dict())]
    twin.load_state_dict(state)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in twin.named_modules()]
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]


def test_safe_loading_refuses_a_pickled_model(tmp_path: Path) -> None:
    model, _, _ = accelerated_and_run(timm_resnet)
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "model.pt", weights_only=True)


# graphs


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)


def exported(model: Any) -> Any:
    sizes = [{0: torch.export.Dim("batch", min=2, max=8)}]
    name = next(iter(inspect.signature(type(model).forward).parameters.keys() - {"self"}), "x")
    if name in ("pixel_values", "x"):
        return torch.export.export(model, (PIXELS,), dynamic_shapes={name: sizes[0]}).module()
    return torch.export.export(model, (PIXELS,)).module()


def jit_traced(model: Any) -> Any:
    return torch.jit.trace(model, PIXELS, check_trace=False, strict=False)


GRAPHS = {"compile": compiled, "export": exported, "jit": jit_traced}


@pytest.mark.parametrize("make_graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("make", [swin_backbone, resnet_backbone, timm_resnet, torchvision_swin])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_graphs_hold_upstreams_forward(make: Callable[[], Any], make_graph: Any) -> None:
    model, twin, report = accelerated_and_run(make)
    with torch.no_grad():
        graph = make_graph(model)
        assert_bit_equal(tensors(graph(PIXELS)), infer(twin))
        for p in [*model.parameters(), *twin.parameters()]:
            p.mul_(0.7)
        if make_graph is compiled:
            assert_bit_equal(tensors(graph(PIXELS)), infer(twin))
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


@torch.no_grad()
@pytest.mark.parametrize("make", [timm_resnet])
def test_fx_traces_upstreams_forward(make: Callable[[], Any]) -> None:
    model, twin, report = accelerated_and_run(make)
    graph: Any = torch.fx.symbolic_trace(model)
    want = torch.fx.symbolic_trace(twin)
    assert str(graph.graph) == str(want.graph)
    assert_bit_equal(infer(graph), infer(twin))
    assert_close(infer(model), infer(twin))
    assert_ours_ran(report)


def test_threads_that_share_a_host_get_right_results(make: Callable[[], Any]) -> None:
    """Threads share the first call too, in which each of them decides."""
    model, twin, report = accelerated(make)
    inputs = [images(32, 32, batch=1 + index % 2, seed=index) for index in range(4)]
    want = [infer(twin, pixels) for pixels in inputs]
    problems: list[str] = []

    def run(pixels: Tensor, expected: list[Tensor]) -> None:
        try:
            for _ in range(4):
                assert_close(infer(model, pixels), expected)
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, want)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        report.refresh()
        infer(model)
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert_ours_ran(report)
