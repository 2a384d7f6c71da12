"""Intended differences from transformers 5.23: upstream's behaviour, then ours."""

import gc
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import constants
from reference_models import SWIN, from_hf, from_timm, hf_swin, images, randomize_, timm_features
from safetensors.torch import load_file, save_file
from tolerance import assert_equals_upstream
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from fastbb import AutoBackbone, SwinBackbone, SwinConfig, TimmBackbone, TimmBackboneConfig

transformers = pytest.importorskip("transformers")

TIMM_NAME, TIMM_REPO = "test_resnet", "timm/test_resnet.r160_in1k"


def swin_maps(model: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(images(40, 44)).feature_maps


def publish_timm_model(hub: HubServer, folder: Path) -> Any:
    model = randomize_(timm.create_model(TIMM_NAME))
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    hub.add_repo(TIMM_REPO, folder)
    return model


def has_weights_of(ours: Any, model: Any) -> bool:
    state = ours.state_dict()
    theirs = model.state_dict()
    shared = [name for name in theirs if f"_backbone.{name}" in state]
    return len(shared) > 10 and all(
        torch.equal(state[f"_backbone.{name}"], theirs[name]) for name in shared
    )


@pytest.mark.parametrize("name", ["local_directory", "relative_path", "offline_cache"])
def test_1_auto_backbone_loads_directories_and_cached_repositories(
    name: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = hf_swin()
    upstream.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    where = {"local_directory": str(tmp_path / "model"), "relative_path": "./model"}.get(name)
    if where is None:
        where = "owner/model"
        hub.add_repo(where, tmp_path / "model")
        transformers.SwinBackbone.from_pretrained(where)  # now it is cached
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    # a validation error of the path as a Hub name; OfflineModeIsEnabled
    with pytest.raises((ValueError, OSError)):
        transformers.AutoBackbone.from_pretrained(where)
    assert_equals_upstream(swin_maps(AutoBackbone.from_pretrained(where)), swin_maps(upstream))


def test_1_auto_backbone_loads_hub_and_timm_names(hub: HubServer, tmp_path: Path) -> None:
    upstream = hf_swin()
    upstream.save_pretrained(tmp_path / "hf")
    hub.add_repo("owner/model", tmp_path / "hf")
    theirs = transformers.AutoBackbone.from_pretrained("owner/model", out_indices=(1,)).eval()
    ours = AutoBackbone.from_pretrained("owner/model", out_indices=(1,))
    assert_equals_upstream(swin_maps(ours), swin_maps(theirs))

    model = publish_timm_model(hub, tmp_path / "timm")
    for name in (TIMM_NAME, TIMM_REPO, "test_resnet.r160_in1k"):
        ours = AutoBackbone.from_pretrained(name, out_indices=(1, 2))
        assert isinstance(ours, TimmBackbone) and has_weights_of(ours, model)
    assert has_weights_of(AutoBackbone.from_pretrained(TIMM_NAME, use_timm_backbone=True), model)


def test_2_use_pretrained_backbone_loads_weights(hub: HubServer, tmp_path: Path) -> None:
    config = transformers.TimmBackboneConfig(backbone=TIMM_NAME, use_pretrained_backbone=True)
    one, two = (transformers.TimmBackbone(config) for _ in range(2))
    drawn = "_backbone.layer1.0.conv1.weight"
    assert not one.state_dict()[drawn].equal(two.state_dict()[drawn])  # random, silently

    with pytest.raises(OSError):  # there is nothing to load
        TimmBackbone(TimmBackboneConfig(TIMM_NAME, use_pretrained_backbone=True))
    model = publish_timm_model(hub, tmp_path)
    ours = TimmBackbone(TimmBackboneConfig(TIMM_NAME, use_pretrained_backbone=True))
    assert has_weights_of(ours, model)
    assert not has_weights_of(TimmBackbone(TimmBackboneConfig(TIMM_NAME)), model)


def flops(model: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(64, 64))
    return counter.get_total_flops()


def test_3_stages_after_the_last_requested_one_do_not_run() -> None:
    first, last = hf_swin(out_indices=[1]), hf_swin(out_indices=[4])
    assert flops(first) == flops(last)
    assert flops(from_hf(first)) < 0.6 * flops(from_hf(last))
    # hidden states need them all
    out = from_hf(first)(images(64, 64), output_hidden_states=True)
    assert len(out.hidden_states) == 5


def test_4_invalid_out_indices_leave_the_config_unchanged() -> None:
    theirs, ours = transformers.SwinConfig(out_indices=[1]), SwinConfig(out_indices=[1])
    for config in (theirs, ours):
        with pytest.raises(ValueError, match="out_indices must be valid indices"):
            config.out_indices = [9]
    assert (theirs.out_features, theirs.out_indices) == (None, [9])
    assert (ours.out_features, ours.out_indices) == (["stage1"], [1])
    with pytest.raises(IndexError):
        transformers.SwinConfig(out_indices=[-6])
    with pytest.raises(ValueError, match="out_indices must be valid indices"):
        SwinConfig(out_indices=[-6])


def test_5_timm_maps_are_nchw_and_follow_out_indices() -> None:
    name, pixels = "test_mambaout", images(64, 64)
    theirs = transformers.TimmBackbone(
        transformers.TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2, 3])
    ).eval()
    ours = from_timm(name, timm_features(name))
    with torch.no_grad():
        assert [m.shape[3] for m in theirs(pixels).feature_maps] == theirs.channels  # NHWC
        assert [m.shape[1] for m in ours(pixels).feature_maps] == ours.channels

        theirs.out_indices = ours.out_indices = [2]
        assert len(theirs(pixels).feature_maps) == 4 != len(theirs.channels)
        assert len(ours(pixels).feature_maps) == 1 == len(ours.channels)

        with pytest.raises(IndexError):
            theirs(pixels, output_hidden_states=True)
        assert len(ours(pixels, output_hidden_states=True).hidden_states) == 4


def test_6_any_image_size_may_follow_any_other() -> None:
    upstream = hf_swin(image_size=64)
    theirs = transformers.SwinModel(upstream.config).eval()
    ours = from_hf(upstream)
    with torch.no_grad():
        windows = [b.window_size for layer in theirs.encoder.layers for b in layer.blocks]
        with pytest.raises(RuntimeError):
            theirs(images(20, 24))  # smaller than a window
        shrunk = [b.window_size for layer in theirs.encoder.layers for b in layer.blocks]
        assert shrunk != windows  # for every later image
        with pytest.raises(RuntimeError):
            theirs(images(224, 224))

        state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        for size in ((20, 24), (224, 160), (20, 24)):
            pixels = images(*size)
            assert_equals_upstream(ours(pixels).feature_maps, upstream(pixels).feature_maps)
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def live_bytes() -> int:
    gc.collect()
    # tensors that oneDNN packed in other tests have no storage
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and not o.is_mkldnn]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_7_nothing_is_prepared_for_one_image_size() -> None:
    options = {"embed_dim": 8, "depths": [2], "num_heads": [1], "out_indices": [1]}
    upstream, counter = hf_swin(**options), CompileCounter()
    ours = from_hf(upstream)
    compiled = torch.compile(upstream, backend=counter, dynamic=False)
    sizes = [(32, 32), (36, 64)]
    with torch.no_grad():
        for i, size in enumerate(sizes):
            compiled(images(*size))
            assert counter.frame_count == i + 1  # one more compilation for each size

        for size in sizes:
            ours(images(*size))  # remembers the window positions of a bounded number of sizes
        prepared = live_bytes()
        for size in sizes:
            ours(images(*size))
        assert live_bytes() == prepared


@pytest.mark.parametrize("names", ["on_disk", "in_memory"])
def test_8_checkpoints_have_transformers_names_in_both_directions(
    names: str, tmp_path: Path
) -> None:
    upstream = hf_swin()
    upstream.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if names == "in_memory":
        save_file(upstream.state_dict(), file, metadata={"format": "pt"})
    ours = AutoBackbone.from_pretrained(tmp_path)
    assert_equals_upstream(swin_maps(ours), swin_maps(upstream))

    ours.save_pretrained(tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert "swin.encoder.layers.0.blocks.0.attention.self.query.weight" in written or (
        "encoder.layers.0.blocks.0.attention.self.query.weight" in written
    )
    theirs = transformers.SwinBackbone.from_pretrained(tmp_path / "back").eval()
    assert_equals_upstream(swin_maps(theirs), swin_maps(upstream))


def test_8_transformers_refuses_configs_that_it_would_compute_differently(tmp_path: Path) -> None:
    # torchvision's Swin shifts and norms differently from transformers', under the same tensors
    torchvision = pytest.importorskip("torchvision")
    weights = randomize_(torchvision.models.swin_t()).state_dict()
    ours = AutoBackbone.from_torchvision("swin_t", weights)
    ours.save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError, KeyError)):
        transformers.AutoConfig.from_pretrained(tmp_path)
    again = AutoBackbone.from_pretrained(tmp_path)
    assert isinstance(again, SwinBackbone)
    assert_equals_upstream(swin_maps(again), swin_maps(ours))
    assert SWIN["w7"]["window_size"] == again.config.window_size
