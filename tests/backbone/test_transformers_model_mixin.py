"""transformers' own model tests, on its SwinBackbone, plain and accelerated.

Two tests of transformers 5.23 fail on any Swin backbone: `test_model_get_set_embeddings` needs
token embeddings, and `test_retain_grad_hidden_states_attentions` a tensor instead of a tuple of
maps.
"""

import unittest
import warnings
from collections import Counter
from functools import wraps
from typing import Any

import pytest
import torch
from upstream_tests import load_upstream_tests

import fastbb
from fastbb.hosts.accelerate import AccelerateWarning
from fastbb.hosts.swin import TransformersSwin, TransformersSwinBlock

transformers = pytest.importorskip("transformers")

# tests with another outcome on the accelerated backbone, and why
DIFFERENCES: dict[str, str] = {}
MIN_PASSED = 90
MIN_RAN_OURS = 25  # most others look at configurations, names and files, or train
RAN_OURS = {
    "test_batching_equivalence",
    "test_determinism",
    "test_hidden_states_output",  # the blocks do
    "test_model_outputs_equivalence",
    "test_save_load",
}
DEPTHS, WINDOW = [1, 2, 1], 2


def swin_config() -> Any:
    """Configuration of transformers' own tests of Swin."""
    return transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=DEPTHS,
        num_heads=[2, 2, 4],
        window_size=WINDOW,
        mlp_ratio=2.0,
        out_features=["stage1", "stage2"],
    )


class ModelTester:
    """Attributes that the mixin reads: a small model, its input, sizes of its result."""

    is_training = True
    batch_size = 13
    num_hidden_layers: int | None = None  # a test fails with Swin's three stages
    num_attention_heads = 2  # of the first
    seq_length = hidden_size = 16  # height and width of the first hidden state

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        from transformers.testing_utils import torch_device

        pixel_values = torch.rand(self.batch_size, 3, 32, 32, device=torch_device)
        return swin_config(), {"pixel_values": pixel_values}


def accelerated(upstream: Any) -> Any:
    """Subclass of `upstream` that is accelerated after construction and after loading weights."""

    def accelerate(model: Any) -> None:
        model.__class__ = upstream  # a class with methods of its own would be left alone
        fastbb.accelerate(model, mode="eager")

    @wraps(upstream.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream.__init__(self, *args, **kwargs)
        accelerate(self)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super(made, cls).from_pretrained(*args, **kwargs)
        accelerate(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    members = {
        "__init__": init,
        "__module__": upstream.__module__,
        "from_pretrained": classmethod(from_pretrained),
    }
    made: Any = type(upstream.__name__, (upstream,), members)
    return made


class Outcomes(unittest.TestResult):
    """Outcome of each test, and how often our forward ran in it."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self.running = ""

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.running = test._testMethodName
        self.of[self.running] = "passed"

    def addSkip(self, test: Any, reason: str) -> None:
        self.of[self.running], self.why[self.running] = "skipped", reason

    def addFailure(self, test: Any, err: Any) -> None:
        self.of[self.running], self.why[self.running] = "failed", repr(err[1])

    addError = addFailure

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.addFailure(test, err)

    def counting(self, forward: Any) -> Any:
        @wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[self.running] += 1
            return forward(*args, **kwargs)

        return counted


def outcomes(mixin: Any, backbone_class: Any) -> Outcomes:
    class Case(mixin, unittest.TestCase):
        all_model_classes = (backbone_class,)
        test_resize_embeddings = False
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self) -> None:
            self.model_tester = ModelTester()

        def test_attention_outputs(self) -> None:
            self.model_tester.num_hidden_layers = len(DEPTHS)
            self.model_tester.seq_length = WINDOW**2
            super().test_attention_outputs()

        def test_hidden_states_output(self) -> None:
            self.model_tester.num_hidden_layers = len(DEPTHS)
            super().test_hidden_states_output()

    found = Outcomes()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # otherwise the mixin runs pytest on this file, for a test that sets the default device
        patch.setenv("_INSIDE_SUB_PROCESS", "1")
        for fast in (TransformersSwin, TransformersSwinBlock):
            patch.setattr(fast, "forward", found.counting(fast.forward))
        warnings.filterwarnings("error", ".* runs upstream's forward", AccelerateWarning)
        torch.manual_seed(0)
        unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(found)
    return found


def test_upstreams_model_tests_end_as_on_upstreams_backbone() -> None:
    mixin = load_upstream_tests("test_modeling_common.py").ModelTesterMixin
    theirs = outcomes(mixin, transformers.SwinBackbone)
    ours = outcomes(mixin, accelerated(transformers.SwinBackbone))
    assert ours.of.keys() == theirs.of.keys()
    differing = {
        name: f"{theirs.of[name]}, accelerated {ours.of[name]}: {ours.why.get(name)}"
        for name in theirs.of
        if ours.of[name] != theirs.of[name]
    }
    unexplained = {name: what for name, what in differing.items() if name not in DIFFERENCES}
    assert not unexplained, unexplained
    assert DIFFERENCES.keys() <= differing.keys(), "listed, and ends as on upstream's"
    assert Counter(theirs.of.values())["passed"] >= MIN_PASSED, theirs.why

    assert not theirs.calls
    assert len(ours.calls) >= MIN_RAN_OURS and ours.calls.keys() >= RAN_OURS, ours.calls
