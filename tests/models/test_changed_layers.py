"""Layers, modes, hooks and forwards of native backbones that change, beside upstream's model."""

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_models import from_hf, hf_resnet, hf_swin, images
from tolerance import assert_equals_upstream
from torch import Tensor, nn

from fastbb.models.swin_modules import SwinMlp
from fastbb.weights.watch import ModuleStamp

PIXELS = images(45, 51)


def swin(**config: Any) -> Any:
    two = {"depths": [2, 1], "num_heads": [2, 4], "out_indices": [0, 1, 2]}
    return hf_swin(**{**two, **config})


def resnet() -> Any:
    return hf_resnet("bottleneck", depths=[2, 1], hidden_sizes=[16, 32], out_indices=[0, 1, 2])


def maps(model: Any, pixels: Tensor = PIXELS) -> list[Tensor]:
    with torch.no_grad():
        return list(model(pixels).feature_maps)


def put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


BLOCK = "swin.encoder.layers.0.blocks.1"
REPLACEMENTS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "norm_without_weights": ("swin.embeddings.norm", lambda: nn.LayerNorm(16, 1e-5, False)),
    "norm_without_bias": (
        "swin.encoder.layers.0.downsample.norm",
        lambda: nn.LayerNorm(64, bias=False),
    ),
    "map_norm_without_weights": (
        "hidden_states_norms.stage1",
        lambda: nn.LayerNorm(16, elementwise_affine=False),
    ),
    "keys_without_bias": (f"{BLOCK}.attention.k_proj", lambda: nn.Linear(16, 16, bias=False)),
    "mlp_without_bias": (f"{BLOCK}.mlp.fc1", lambda: nn.Linear(16, 64, bias=False)),
    "another_activation": (f"{BLOCK}.mlp.activation_fn", lambda: nn.Tanh()),
    "overlapping_patches": (
        "swin.embeddings.patch_embeddings.projection",
        lambda: nn.Conv2d(3, 16, 7, stride=4, padding=3),
    ),
    "smaller_patches": (
        "swin.embeddings.patch_embeddings.projection",
        lambda: nn.Conv2d(3, 16, 2, stride=2),
    ),
}


@pytest.mark.parametrize("case", REPLACEMENTS)
def test_layers_that_the_ops_do_not_cover_compute_as_in_upstreams_model(case: str) -> None:
    name, make = REPLACEMENTS[case]
    upstream = swin()
    backbone = from_hf(upstream)
    before = maps(backbone)
    torch.manual_seed(0)
    layer = make()
    for model in (upstream, backbone):
        put(model, name, copy.deepcopy(layer))
    assert_equals_upstream(maps(backbone), maps(upstream))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(maps(backbone), before))
    assert backbone.called_modules()


def test_a_pool_that_changes_is_followed() -> None:
    upstream = resnet()
    backbone = from_hf(upstream)
    maps(backbone)
    for model in (upstream, backbone):
        model.embedder.pooler.stride = 1
    assert_equals_upstream(maps(backbone), maps(upstream))


def test_stages_in_eval_mode_of_a_training_model_are_deterministic_as_upstreams() -> None:
    upstream = swin(drop_path_rate=0.5)
    backbone = from_hf(upstream)
    for model in (upstream, backbone):
        model.train()
        for stage in (model.swin.embeddings, *model.swin.encoder.layers):
            stage.eval()
    assert_equals_upstream(maps(backbone), maps(upstream))


@pytest.mark.parametrize("name", [f"{BLOCK}.dropout", f"{BLOCK}.attention", "swin.embeddings"])
def test_one_module_in_training_mode_drops_as_upstreams(name: str) -> None:
    upstream = swin(hidden_dropout_prob=1.0, attention_probs_dropout_prob=1.0)
    backbone = from_hf(upstream)
    before = maps(backbone)
    for model in (upstream, backbone):
        model.get_submodule(name).train()
    got = maps(backbone)
    assert_equals_upstream(got, maps(upstream))
    assert not torch.allclose(got[-1], before[-1])
    assert backbone.called_modules() == {}


def test_a_rate_of_dropout_that_changes_is_followed() -> None:
    upstream = swin(drop_path_rate=0.0)
    backbone = from_hf(upstream)
    for model in (upstream, backbone):
        model.train()
        model.swin.encoder.layers[0].blocks[0].dropout.p = 1.0
    assert_equals_upstream(maps(backbone), maps(upstream))


def test_a_forward_put_on_a_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = from_hf(swin())
    before, own = maps(backbone), SwinMlp.forward
    monkeypatch.setattr(SwinMlp, "forward", lambda self, x: 2 * own(self, x))
    assert not torch.allclose(maps(backbone)[-1], before[-1])
    assert set(backbone.called_modules().values()) == {"the forward of SwinMlp was changed"}
    monkeypatch.undo()
    assert all(map(torch.equal, maps(backbone), before))


@pytest.mark.parametrize("make", [swin, resnet])
def test_hooks_run_after_their_dictionary_was_replaced(make: Callable[[], Any]) -> None:
    backbone, calls = from_hf(make()), []
    maps(backbone)
    for module in backbone.modules():
        module._forward_hooks = OrderedDict()
    layer = next(m for m in backbone.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    layer.register_forward_hook(lambda *_: calls.append(1))
    maps(backbone)
    assert calls == [1]


@pytest.mark.parametrize("make", [swin, resnet])
def test_a_hook_that_refers_to_its_backbone_does_not_keep_it_alive(
    make: Callable[[], Any],
) -> None:
    backbone = from_hf(make())
    layer = next(m for m in backbone.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    layer.register_forward_hook(lambda *_, backbone=backbone: None)
    maps(backbone)
    alive = weakref.ref(backbone)
    del backbone, layer
    gc.collect()
    assert alive() is None


class Wrapper(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.inside(*args, **options)


@pytest.mark.parametrize(
    "name", ["swin.embeddings", f"{BLOCK}.attention", BLOCK, "swin.encoder.layers.0.downsample"]
)
def test_a_module_in_a_wrapper_is_called(name: str) -> None:
    backbone = from_hf(swin())
    before = maps(backbone)
    put(backbone, name, Wrapper(backbone.get_submodule(name)))
    assert_equals_upstream(maps(backbone), before)


def test_a_replaced_stage_without_its_merging_is_an_error_that_names_it() -> None:
    backbone = from_hf(swin())
    put(backbone, "swin.encoder.layers.0", Wrapper(backbone.swin.encoder.layers[0]))
    with pytest.raises(ValueError, match="Wrapper was put in place of a stage .* `downsample`"):
        maps(backbone)


@pytest.mark.parametrize("make", [swin, resnet])
@pytest.mark.parametrize("change", ["disable", "switch", "scale"])
def test_a_stamp_notices_adapters_that_are_switched(make: Callable[[], Any], change: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "convolution"]
    model = peft.get_peft_model(from_hf(make()), peft.LoraConfig(r=2, target_modules=targets))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=targets))
    model.set_adapter("default")
    stamp = ModuleStamp(model.eval().get_base_model())
    assert stamp.is_current()
    if change == "disable":
        with model.disable_adapter():
            assert not stamp.is_current()
        return
    if change == "switch":
        model.set_adapter("other")
    else:
        layer: Any = next(m for m in model.modules() if hasattr(m, "scaling"))
        layer.scaling["default"] *= 3
    assert not stamp.is_current()


@pytest.mark.parametrize("part", ["trunk", "norms", "nothing"])
def test_a_part_of_the_weights_leaves_the_others(part: str) -> None:
    backbone = from_hf(swin())
    before, state = maps(backbone), backbone.state_dict()
    is_norm = {"trunk": False, "norms": True}.get(part)
    state = {n: t for n, t in state.items() if n.startswith("hidden_states_norms.") == is_norm}
    backbone.load_state_dict(state, strict=False)
    assert all(map(torch.equal, maps(backbone), before))


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (f"{BLOCK}.mlp.fc1", Doubled(16, 64)),
        (f"{BLOCK}.layernorm_after", nn.Identity()),
        ("hidden_states_norms.stage1", nn.Identity()),
        (f"{BLOCK}.mlp.fc2", nn.utils.parametrizations.weight_norm(nn.Linear(64, 16))),
    ],
    ids=["subclass", "identity", "identity_of_a_map", "parametrized"],
)
def test_a_checkpoint_that_would_compute_other_maps_is_not_saved(
    name: str, layer: nn.Module, tmp_path: Path
) -> None:
    backbone = from_hf(swin())
    put(backbone, name, layer)
    with pytest.raises(ValueError, match="no checkpoint of a SwinBackbone has"):
        backbone.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_hooks_do_not_prevent_saving(tmp_path: Path) -> None:
    backbone = from_hf(swin())
    backbone.swin.embeddings.norm.register_forward_hook(lambda *_: None)
    backbone.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_norms_of_maps_with_hooks_are_named() -> None:
    backbone = from_hf(swin())
    handle = backbone.hidden_states_norms["stage1"].register_forward_hook(lambda *_: None)
    assert backbone.called_modules() == {"hidden_states_norms.stage1": "hooks on a LayerNorm"}
    prepared = backbone.prepare(mode="eager")
    maps(prepared)
    assert "hooks on a LayerNorm" in str(prepared.explain())
    assert "some calls  eager" in str(prepared.explain())
    handle.remove()
    assert "hooks on" not in str(prepared.explain())


@pytest.mark.parametrize(
    "layer",
    [
        "swin.embeddings.norm",
        f"{BLOCK}.layernorm_before",
        f"{BLOCK}.mlp",
        f"{BLOCK}.mlp.fc1",
        "swin.encoder.layers.0.downsample.norm",
        "swin.encoder.layers.0.downsample.reduction",
    ],
)
def test_hooks_on_layers_of_a_swin_see_the_tokens_of_upstream(layer: str) -> None:
    """Upstream has flattened the maps of tokens."""
    upstream = swin()
    seen: list[Tensor] = []
    for model in (upstream, from_hf(upstream)):
        model.get_submodule(layer).register_forward_hook(lambda _, args, y: seen.append(y))
        maps(model)
    theirs, ours = seen
    assert_equals_upstream(ours.flatten(1, -2), theirs)
