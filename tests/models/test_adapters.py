"""PEFT adapters in native backbones: trained, merged, saved and loaded as in upstream."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_models import from_hf, hf_resnet, hf_swin, images
from tolerance import assert_equals_upstream
from torch import Tensor
from vit_models import hf_vit

from fastbb import AutoBackbone

peft = pytest.importorskip("peft")

PIXELS = images(45, 51)
SWIN = {"depths": [2, 2], "num_heads": [2, 4], "out_indices": [1, 2]}
RESNET = {"depths": [2, 1], "hidden_sizes": [16, 32], "out_indices": [1, 2]}


def swin(**config: Any) -> Any:
    return hf_swin(**{**SWIN, **config})


def resnet() -> Any:
    return hf_resnet("bottleneck", **RESNET)


def vit() -> Any:
    return hf_vit("dinov3_vit", pos_embed_rescale=None)


def lora(*targets: str, **options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "swin_qv": (swin, lambda: lora("q_proj", "v_proj")),
    "swin_everything": (
        lambda: swin(use_absolute_embeddings=False),
        lambda: lora("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "reduction"),
    ),
    "swin_patches": (swin, lambda: lora("projection")),
    "swin_dora": (swin, lambda: lora("q_proj", "fc1", use_dora=True)),
    "swin_norms_too": (
        swin,
        lambda: lora("q_proj", modules_to_save=["layernorm_before", "hidden_states_norms.stage2"]),
    ),
    "swin_ia3": (
        swin,
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "fc2"],
            feedforward_modules=["fc2"],
            init_ia3_weights=False,
        ),
    ),
    "vit_everything": (
        vit,
        lambda: lora("q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "patch_embeddings"),
    ),
    "resnet_convolutions": (resnet, lambda: lora("convolution")),
    "resnet_one": (resnet, lambda: lora("layer.1.convolution", use_dora=True)),
}


def adapted(case: str) -> tuple[Any, Any]:
    """transformers' model and ours with the same adapter, of random weights."""
    make, config = CASES[case]
    upstream = make()
    backbone = from_hf(upstream)
    torch.manual_seed(0)
    theirs, ours = peft.get_peft_model(upstream, config()), peft.get_peft_model(backbone, config())
    names = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert names == {n for n, p in ours.named_parameters() if p.requires_grad} and names
    ours.load_state_dict({n: p for n, p in theirs.state_dict().items() if n in names}, strict=False)
    return theirs.eval(), ours.eval()


def maps(model: Any, pixels: Tensor = PIXELS) -> list[Tensor]:
    with torch.inference_mode():
        return list(model(pixels).feature_maps)


def loss(model: Any, pixels: Tensor) -> Tensor:
    return torch.stack([m.square().mean() for m in model(pixels).feature_maps]).sum()


@pytest.mark.parametrize("case", CASES)
def test_adapted_backbone_equals_upstreams_model_with_the_adapter(case: str) -> None:
    theirs, ours = adapted(case)
    assert_equals_upstream(maps(ours), maps(theirs))
    with theirs.disable_adapter(), ours.disable_adapter():
        assert_equals_upstream(maps(ours), maps(theirs))
        assert_equals_upstream(maps(ours), maps(CASES[case][0]()))


@pytest.mark.parametrize("case", CASES)
def test_trained_adapter_equals_that_of_upstreams_model(case: str) -> None:
    states = []
    for model in adapted(case):
        model.double().train()
        # running statistics are compared below, dropout is off
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for step in range(3):
            optimizer.zero_grad()
            pixels = images(45, 51, seed=step).double()
            loss(model, pixels).backward()
            optimizer.step()
        states.append((model.state_dict(), maps(model.eval(), PIXELS.double())))
    (theirs, their_maps), (ours, our_maps) = states
    before = adapted(case)[0].state_dict()
    trained = [n for n in theirs if not torch.allclose(theirs[n], before[n].to(theirs[n].dtype))]
    assert any("lora" in name or "ia3" in name for name in trained)
    for name in trained:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-7, atol=1e-10), name
    for got, want in zip(our_maps, their_maps):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", [c for c in CASES if c != "swin_norms_too"])
def test_a_merged_adapter_runs_on_the_parameters_and_loads_in_transformers(
    case: str, tmp_path: Path
) -> None:
    theirs, ours = adapted(case)
    want = maps(theirs)
    merged = ours.merge_and_unload()
    assert merged.called_modules() == {}
    assert_equals_upstream(maps(merged), want, rel=2e-5)  # merging rounds the weights
    assert_equals_upstream(maps(merged.prepare(mode="eager")), want, rel=2e-5)
    merged.save_pretrained(tmp_path)
    assert_equals_upstream(maps(AutoBackbone.from_pretrained(tmp_path)), maps(merged))
    reloaded = type(CASES[case][0]()).from_pretrained(tmp_path)
    assert_equals_upstream(maps(merged), maps(reloaded))


@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_loads_here_and_in_transformers(case: str, tmp_path: Path) -> None:
    make, _ = CASES[case]
    theirs, ours = adapted(case)
    for model, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        model.save_pretrained(folder)
    upstream, backbone = make(), from_hf(make())
    loaded = peft.PeftModel.from_pretrained(upstream, str(tmp_path / "ours")).eval()
    assert_equals_upstream(maps(loaded), maps(ours))
    loaded = peft.PeftModel.from_pretrained(backbone, str(tmp_path / "theirs")).eval()
    assert_equals_upstream(maps(loaded), maps(theirs))


def test_weights_around_an_adapter_are_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    _, ours = adapted("swin_qv")
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.bias.*merge_and_unload"):
        ours.get_base_model().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_with_an_adapter_is_verified_after_it_is_merged() -> None:
    _, ours = adapted("swin_qv")
    with pytest.raises(ValueError, match="merge_and_unload"):
        ours.get_base_model().verify()
    report = ours.merge_and_unload().verify()
    assert report.passed and "transformers" in report.reference


def test_gradient_checkpointing_with_an_adapter_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        _, model = adapted("swin_everything")
        model.double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss(model, PIXELS.double()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient), name


def test_a_prepared_backbone_follows_an_adapter() -> None:
    theirs, ours = adapted("resnet_convolutions")
    prepared = ours.get_base_model().prepare(mode="eager")
    assert_equals_upstream(maps(prepared), maps(theirs))
    assert "a Conv2d of peft was put into it" in " ".join(str(prepared.explain()).split())
    with torch.no_grad():
        for model in (theirs, ours):
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2)
    assert_equals_upstream(maps(prepared), maps(theirs))


def test_copy_has_its_own_adapter() -> None:
    _, ours = adapted("swin_qv")
    before, twin = maps(ours), copy.deepcopy(ours)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert all(map(torch.equal, maps(twin), before))
    assert not torch.equal(maps(ours)[-1], before[-1])
