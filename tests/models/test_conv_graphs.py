"""Graphs of torch.compile and torch.export hold our ops for a GPU, and plain PyTorch for a CPU.

The CUDA device is that of fake tensors, so nothing is computed on it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
from reference_models import images, randomize_
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from fastbb import ResNetBackbone, ResNetConfig, TimmBackbone, TimmBackboneConfig

SHAPE = {"embedding_size": 16, "depths": [2, 2], "hidden_sizes": [32, 64], "out_indices": [0, 1, 2]}


def bottleneck() -> nn.Module:
    return ResNetBackbone(ResNetConfig(**SHAPE))


def basic() -> nn.Module:
    return ResNetBackbone(ResNetConfig(**SHAPE, layer_type="basic"))


def timm_resnet() -> nn.Module:
    options = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}
    return TimmBackbone(TimmBackboneConfig("resnet26d", backbone_kwargs=options, out_indices=[4]))


def timm_mobile() -> nn.Module:
    return TimmBackbone(TimmBackboneConfig("test_efficientnet", out_indices=[2]))


MODELS = {
    bottleneck: {"stem_conv_bn_relu_pool": 1, "conv1x1_bn_act": 6, "conv1x1_dual": 2, "3x3": 4},
    basic: {"stem_conv_bn_relu_pool": 1, "conv1x1_bn_act": 2, "3x3": 8},
    # the first stage has as many channels as the stem, so its shortcut does not convolve
    timm_resnet: {"conv1x1_bn_act": 5, "conv1x1_dual": 3, "3x3": 7},
    timm_mobile: None,
}
AUTO_3X3 = "fastest_conv3x3_bn_act"


def compiled_graphs(model: nn.Module, pixels: Tensor) -> list[GraphModule]:
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(model, fullgraph=True, backend=backend)(pixels)
    return graphs


def exported_graphs(model: nn.Module, pixels: Tensor) -> list[GraphModule]:
    batch = torch.export.Dim("batch", min=2, max=64)
    return [torch.export.export(model, (pixels,), dynamic_shapes=({0: batch},)).graph_module]


def our_ops(graphs: list[GraphModule]) -> Counter[str]:
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    names = [target.split(".")[1] for target in targets if target.startswith("fastbb.")]
    return Counter("3x3" if name == AUTO_3X3 else name for name in names)


@contextmanager
def fake_cuda() -> Iterator[None]:
    properties = SimpleNamespace(major=9, minor=0)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device("cuda"),
        mock.patch("torch.cuda.get_device_properties", lambda _: properties),
        mock.patch("fastbb_kernels._dispatch._gpus", {}),
    ):
        # a fake tensor cannot be the data of a real parameter
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.fixture(autouse=True)
def without_what_was_compiled_before() -> None:
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("graphs_of", [compiled_graphs, exported_graphs])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_graphs_for_a_gpu_hold_our_ops(make: Callable[[], nn.Module], graphs_of: Any) -> None:
    model = make().eval()
    with fake_cuda():
        model.to_empty(device="cuda")
        ops = our_ops(graphs_of(model, torch.empty(2, 3, 64, 64)))
    wanted = MODELS[make]
    if wanted is None:  # the report says which
        assert isinstance(model, TimmBackbone)
        wanted = Counter(norm.op for norm in model.fold_report.folded if norm.op)
        wanted["3x3"] = wanted.pop("conv3x3_bn_act")
    assert ops == wanted


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_graphs_for_a_cpu_hold_plain_pytorch(make: Callable[[], nn.Module]) -> None:
    model, pixels = randomize_(make()), images(64, 64)
    assert our_ops(compiled_graphs(model, pixels)) == Counter()
    want = model(pixels).feature_maps
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equals_upstream(compiled(pixels).feature_maps, want)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(model, (pixels,), dynamic_shapes=shapes).module()
    assert_equals_upstream(exported(pixels).feature_maps, want)
