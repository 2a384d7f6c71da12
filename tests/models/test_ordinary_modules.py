"""Hooks and replaced layers in native backbones, which are called as in any other module."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from reference_models import (
    STAGES,
    from_hf,
    hf_maskformer_swin,
    hf_resnet,
    hf_swin,
    images,
    randomize_,
)
from tolerance import assert_equals_upstream
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from vit_models import hf_vit

from fastbb import AutoBackbone

# odd sizes: windows and patches are padded
PIXELS = images(45, 51)
MODELS: dict[str, Callable[[], Any]] = {
    "swin": hf_swin,
    "maskformer_swin": hf_maskformer_swin,
    "basic_resnet": hf_resnet,
    "bottleneck_resnet": lambda: hf_resnet("bottleneck", hidden_act="gelu"),
    "dinov2": partial(hf_vit, "dinov2"),
    "dinov3": partial(hf_vit, "dinov3_vit"),
    "beit": partial(hf_vit, "beit", use_shared_relative_position_bias=True),
}
# a layer of each kind
SWIN_LAYERS = [
    "swin.embeddings.patch_embeddings.projection",
    "swin.embeddings.norm",
    "swin.encoder.layers.0.downsample.norm",
    "swin.encoder.layers.0.downsample.reduction",
    "swin.encoder.layers.0.blocks.1.layernorm_before",
    "swin.encoder.layers.0.blocks.1.attention.q_proj",
    "swin.encoder.layers.0.blocks.1.attention.o_proj",
    "swin.encoder.layers.3.blocks.1.layernorm_after",
    "swin.encoder.layers.3.blocks.1.mlp.fc1",
    "swin.encoder.layers.3.blocks.1.mlp.fc2",
    "swin.encoder.layers.1.blocks.0.mlp.activation_fn",
    "swin.encoder.layers.1.blocks.0.dropout",
    "swin.encoder.layers.0.blocks.1.drop_path",
    "swin.embeddings.dropout",
    "hidden_states_norms.stage2",
]
RESNET_LAYERS = [
    "embedder.embedder.convolution",
    "embedder.embedder.normalization",
    "encoder.stages.0.layers.1.layer.0.convolution",
    "encoder.stages.1.layers.0.shortcut.convolution",
    "encoder.stages.1.layers.0.shortcut.normalization",
    "encoder.stages.3.layers.0.layer.1.normalization",
    "embedder.embedder.activation",
    "embedder.pooler",
    "encoder.stages.0.layers.0.activation",
    "encoder.stages.0.layers.0.layer.0.activation",
    "encoder.stages.2.layers.0.shortcut",
]
VIT_LAYERS = {
    "dinov2": [
        "encoder.layer.0.attention.k_proj",
        "encoder.layer.1.layer_scale1",
        "encoder.layer.2.mlp.activation_fn",
        "layernorm",
    ],
    "dinov3": ["model.layer.1.attention.q_proj", "model.layer.0.norm2"],
    "beit": ["beit.embeddings.dropout", "beit.layers.1.dropout", "beit.layers.0.attention.o_proj"],
}
LAYERS = [
    *(("swin", name) for name in SWIN_LAYERS),
    *((kind, name) for kind in ("basic_resnet", "bottleneck_resnet") for name in RESNET_LAYERS),
    *((kind, name) for kind, names in VIT_LAYERS.items() for name in names),
]


class Scaled(nn.Module):
    """A layer around another one, as adapters are; what it makes of zeros is no bias."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.layer(x) + 0.1


def replace_(model: Any, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))


def maps(model: Any, pixels: Tensor = PIXELS) -> list[Tensor]:
    with torch.no_grad():
        return list(model(pixels).feature_maps)


def containers(model: nn.Module) -> set[str]:
    """Lists and dictionaries of modules, which nobody calls."""
    return {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.ModuleDict)}


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_every_module_run_as_often_as_upstreams_and_change_no_map(name: str) -> None:
    upstream = MODELS[name]()
    backbone = from_hf(upstream)
    before = maps(backbone)
    calls: list[Counter[str]] = []
    for model in (upstream, backbone):
        counter: Counter[str] = Counter()
        calls.append(counter)
        for layer, module in model.named_modules():
            module.register_forward_hook(lambda *_, layer=layer, n=counter: n.update([layer]))
        assert_equals_upstream(maps(model), before)
    theirs, ours = calls
    # of the model's output; of no map
    unused = {"swin.layernorm", "hidden_states_norms.stem", "beit.layernorm", "fpn"}
    if name != "maskformer_swin":  # which has other names
        expected = {n: count for n, count in theirs.items() if n not in unused}
        assert {n: count for n, count in ours.items() if n not in unused} == expected
    silent = {n for n, _ in backbone.named_modules()} - ours.keys() - unused
    assert silent == containers(backbone)


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_hook_that_changes_a_layers_output_changes_maps_as_in_upstream(
    name: str, layer: str
) -> None:
    upstream = MODELS[name]()
    backbone = from_hf(upstream)
    for model in (upstream, backbone):
        model.get_submodule(layer).register_forward_hook(lambda _, args, y: 1.5 * y)
    before = maps(from_hf(MODELS[name]()))
    assert_equals_upstream(maps(backbone), maps(upstream))
    assert any(not torch.equal(a, b) for a, b in zip(maps(backbone), before))


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_replaced_layer_computes_as_in_upstreams_model(name: str, layer: str) -> None:
    upstream = MODELS[name]()
    backbone = from_hf(upstream)
    before = maps(backbone)
    for model in (upstream, backbone):
        replace_(model, layer, Scaled)
    assert_equals_upstream(maps(backbone), maps(upstream))
    replace_(backbone, layer, lambda scaled: scaled.layer)  # type: ignore[arg-type, return-value]
    assert all(map(torch.equal, maps(backbone), before))


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_gradients_through_hooks_and_replaced_layers_equal_upstream(name: str, layer: str) -> None:
    upstream = MODELS[name]().double()
    backbone = from_hf(upstream).double()
    gradients = []
    for model in (upstream, backbone):
        replace_(model, layer, Scaled)
        seen: list[Tensor] = []
        model.get_submodule(layer).layer.register_full_backward_hook(
            lambda _, inputs, outputs, seen=seen: seen.append(outputs[0].flatten().sort().values)
        )
        torch.stack(
            [m.square().mean() for m in model(PIXELS.double()).feature_maps]
        ).sum().backward()
        outputs = torch.cat(seen)  # a dropout is called twice
        weights = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((weights, outputs.norm()))
    (theirs, seen_theirs), (ours, seen_ours) = gradients
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert torch.allclose(ours[key], gradient, rtol=1e-6, atol=1e-12), key
    assert torch.allclose(seen_ours, seen_theirs)


@pytest.mark.parametrize("name", ["basic_resnet", "bottleneck_resnet"])
def test_hooks_on_modules_of_a_resnet_see_the_values_of_upstream(name: str) -> None:
    upstream = MODELS[name]()
    backbone = from_hf(upstream)
    seen: dict[Any, dict[str, Tensor]] = {upstream: {}, backbone: {}}
    names = [n for n, _ in backbone.named_modules() if n and n not in containers(backbone)]
    for model, outputs in seen.items():
        for layer in set(names) - {"encoder"}:
            model.get_submodule(layer).register_forward_hook(
                # upstream adds the residual in place
                lambda _, args, y, layer=layer, outputs=outputs: outputs.update({layer: y.clone()})
            )
        maps(model)
    assert seen[backbone].keys() == seen[upstream].keys()
    for layer, theirs in seen[upstream].items():
        assert_equals_upstream(seen[backbone][layer], theirs)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_block_with_a_hook_runs_layer_by_layer(name: str) -> None:
    backbone = from_hf(MODELS[name]())
    blocks = [n for n, m in backbone.named_modules() if type(m).__name__.endswith("Layer")]
    parents = ("blocks", "layers", "encoder.layer", "model.layer")
    blocks = [n for n in blocks if n.rpartition(".")[0].endswith(parents)]
    block = backbone.get_submodule(blocks[1])
    assert backbone.called_modules() == {}
    inner = next(m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    handle = inner.register_forward_hook(lambda *_: None)
    kind = type(inner).__name__
    assert backbone.called_modules() == {blocks[1]: f"hooks on a {kind}"}
    assert f"{blocks[1]}: hooks on a {kind}" in " ".join(str(backbone.explain()).split())
    handle.remove()
    assert backbone.called_modules() == {}


@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_all_modules_see_every_layer(name: str) -> None:
    backbone, seen = from_hf(MODELS[name]()), []
    before = maps(backbone)
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        assert_equals_upstream(maps(backbone), before)
    finally:
        handle.remove()
    layers = [m for m in backbone.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert layers and {id(m) for m in layers} <= {id(m) for m in seen}
    seen.clear()
    assert all(map(torch.equal, maps(backbone), before)) and not seen


def test_a_replaced_block_takes_and_returns_a_map_of_tokens() -> None:
    backbone, shapes = from_hf(hf_swin()), []

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shapes.append(list(x.shape))
            return x

    backbone.swin.encoder.layers[0].blocks[1] = Nothing()
    maps(backbone)
    assert shapes == [[2, 12, 13, 16]]


def test_a_replaced_attention_is_refused() -> None:
    backbone = from_hf(hf_swin())
    block = backbone.swin.encoder.layers[0].blocks[0]
    block.attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(ValueError, match="MultiheadAttention was put in place of the attention"):
        maps(backbone)


def test_a_parametrized_layer_is_still_computed_from_its_weight() -> None:
    backbone, want = from_hf(hf_swin()), from_hf(hf_swin())
    layer, other = (m.swin.encoder.layers[0].blocks[0].mlp.fc1 for m in (backbone, want))
    nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
        other.weight.mul_(2)
    assert backbone.called_modules() == {}
    assert_equals_upstream(maps(backbone), maps(want))


@pytest.mark.parametrize("layer", ["", "swin", "swin.encoder", "swin.encoder.layers.3", "q_proj"])
def test_attentions_and_early_exit_with_hooks_are_unchanged(layer: str) -> None:
    backbone = from_hf(hf_swin())
    want = backbone(PIXELS, output_attentions=True, output_hidden_states=True)
    name = "swin.encoder.layers.3.blocks.1.attention.q_proj" if layer == "q_proj" else layer
    calls: list[int] = []
    backbone.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    got = backbone(PIXELS, output_attentions=True, output_hidden_states=True)
    assert calls == [1]
    for ours, theirs in [
        (got.attentions, want.attentions),
        (got.hidden_states, want.hidden_states),
        (got.feature_maps, want.feature_maps),
    ]:
        assert_equals_upstream(ours, theirs)
    backbone.out_indices = [1]
    assert_equals_upstream(maps(backbone), [want.feature_maps[STAGES.index(1)]])


@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_a_prepared_backbone_with_hooks_calls_them_once(mode: str) -> None:
    backbone = from_hf(hf_resnet())
    prepared = backbone.prepare(mode=mode)
    before = maps(prepared)
    calls: list[int] = []
    layer = prepared.encoder.stages[0].layers[0].layer[0].convolution
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    assert_equals_upstream(maps(prepared), before)
    assert calls == [1]
    handle.remove()
    assert_equals_upstream(maps(prepared), before)
    assert calls == [1]


def test_hooks_leave_the_maps_of_a_torchvision_backbone_unchanged() -> None:
    import torchvision

    upstream: Any = torchvision.models.SwinTransformer([2, 2], 16, [2, 2], [2, 2], [7, 7])
    randomize_(upstream)
    backbone = AutoBackbone.from_torchvision(None, upstream, out_indices=(1, 2)).eval()
    # the second stage has a map that one window covers, which is not shifted
    pixels = images(25, 41)
    before = maps(backbone, pixels)
    for module in backbone.modules():
        module.register_forward_hook(lambda *_: None)
    assert_equals_upstream(maps(backbone, pixels), before)


@torch.no_grad()
@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_of_everything_in_training_is_upstreams_layer_by_layer(field: str) -> None:
    config: dict[str, Any] = {field: 1.0}
    upstream = hf_swin(**config)
    backbone = from_hf(upstream)
    for module in backbone.modules():
        module.register_forward_hook(lambda *_: None)
    before = maps(backbone)
    ours, theirs = maps(backbone.train()), maps(upstream.train())
    assert_equals_upstream(ours, theirs)
    assert not torch.allclose(ours[-1], before[-1])
