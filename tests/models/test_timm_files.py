"""TimmBackbone saved, loaded and reconfigured: options, precision and pruned files."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from reference_models import randomize_
from safetensors.torch import save_file
from tolerance import assert_equals_upstream

from fastbb import AutoBackbone, AutoConfig, TimmBackbone, TimmBackboneConfig

PIXELS = torch.randn(1, 3, 64, 64)


def saved(tmp_path, name="test_resnet", **fields):
    backbone = randomize_(TimmBackbone(TimmBackboneConfig(name, **fields)))
    backbone.save_pretrained(tmp_path)
    return backbone


def timm_directory(path, **model_args):
    model = randomize_(timm.create_model("test_resnet", **model_args))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, path / "model.safetensors")
    cfg = timm.get_pretrained_cfg("test_resnet")
    assert cfg is not None
    config = {"architecture": "test_resnet", "model_args": model_args, "num_classes": 1000}
    (path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg.to_dict()}))


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"output_stride": 8},
        {"freeze_batch_norm_2d": True},
        {"backbone_kwargs": {"stem_type": "deep", "stem_width": 16}},
        {"num_channels": 1},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_options_survive_saving(tmp_path, fields):
    backbone = saved(tmp_path, out_indices=[1, 4], **fields)
    loaded = AutoBackbone.from_pretrained(tmp_path)
    pixels = PIXELS[:, : backbone.config.num_channels]
    added = {"architectures": ["TimmBackbone"], "dtype": "float32"}
    assert loaded.config.to_dict() == {**backbone.config.to_dict(), **added}
    assert not loaded.training
    assert_equals_upstream(loaded(pixels).feature_maps, backbone(pixels).feature_maps, rel=0)


@torch.no_grad()
@pytest.mark.parametrize("name, indices", [("resnet18", [1, 3]), ("test_vit", [0, 1])], ids=str)
def test_files_pruned_by_transformers_load(tmp_path, name, indices):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=indices)
    upstream = randomize_(transformers.TimmBackbone(config))
    upstream.save_pretrained(tmp_path)
    loaded = AutoBackbone.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 160, 160)
    assert loaded.out_indices == indices
    assert_equals_upstream(loaded(pixels).feature_maps, upstream(pixels).feature_maps)
    loaded.out_indices = [-1]
    with pytest.raises(ValueError, match="is not there: .*the checkpoint was saved without it"):
        loaded(pixels)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "swinv2_tiny_window8_256"])
def test_low_precision_reaches_buffers_that_are_not_saved(tmp_path, name):
    small = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 2, 3, 4)}
    saved(tmp_path, name, img_size=64, backbone_kwargs=small if name.startswith("swin") else {})
    for dtype in (torch.bfloat16, "float16"):
        loaded = AutoBackbone.from_pretrained(tmp_path, torch_dtype=dtype)
        assert loaded(PIXELS.to(loaded.dtype)).feature_maps[0].dtype == loaded.dtype


def test_config_argument_and_overrides_are_combined(tmp_path):
    timm_directory(tmp_path)
    config = TimmBackboneConfig("test_resnet")
    loaded = AutoBackbone.from_pretrained(tmp_path, config=config, out_indices=[1, 2])
    assert loaded.out_indices == [1, 2] and config.stage_names is None
    transformers = pytest.importorskip("transformers")
    theirs = transformers.TimmBackboneConfig(backbone="test_resnet", out_indices=[2])
    assert TimmBackbone.from_pretrained(tmp_path, config=theirs).out_indices == [2]


@torch.no_grad()
def test_model_args_of_a_timm_directory_reach_the_configuration(tmp_path):
    timm_directory(tmp_path, output_stride=8)
    plain = AutoBackbone.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    again = AutoBackbone.from_pretrained(tmp_path, config=config)
    assert plain(PIXELS).feature_maps[0].shape[-1] == 8
    assert_equals_upstream(again(PIXELS).feature_maps, plain(PIXELS).feature_maps, rel=0)


def test_timm_options_apply_to_a_saved_directory(tmp_path):
    saved(tmp_path, backbone_kwargs={"drop_path_rate": 0.1})
    loaded = AutoBackbone.from_pretrained(tmp_path, drop_rate=0.5)
    assert loaded.config.backbone_kwargs == {"drop_path_rate": 0.1, "drop_rate": 0.5}
    frozen = AutoBackbone.from_pretrained(tmp_path, freeze_batch_norm_2d=True)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    with pytest.raises(ValueError, match="cannot be built with .*no_such_option"):
        AutoBackbone.from_pretrained(tmp_path, no_such_option=1)


def test_fields_inside_backbone_kwargs_become_fields():
    kwargs = {"in_chans": 1, "out_indices": (1, 2), "output_stride": 8}
    config = TimmBackboneConfig("test_resnet", backbone_kwargs=kwargs)
    assert (config.num_channels, config.out_indices, config.output_stride) == (1, [1, 2], 8)
    assert config.backbone_kwargs == {}
    assert len(TimmBackbone(config)(PIXELS[:, :1]).feature_maps) == 2


def test_loads_in_threads_leave_logging_as_it_was(tmp_path):
    saved(tmp_path)
    log = logging.getLogger("timm.models._builder")
    before = log.level, log.propagate, list(log.handlers)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: AutoBackbone.from_pretrained(tmp_path), range(8)))
    assert (log.level, log.propagate, log.handlers) == before


@torch.no_grad()
def test_dropout_in_training_mode_acts_under_an_eval_parent():
    kwargs = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 2, 3, 4)}
    backbone = TimmBackbone(
        TimmBackboneConfig(
            "swin_tiny_patch4_window7_224", backbone_kwargs={**kwargs, "proj_drop_rate": 0.5}
        )
    ).eval()
    assert backbone.native_forward() is not None
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    first, second = (backbone(PIXELS).feature_maps[0] for _ in range(2))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_a_stage_without_a_timm_feature_is_refused():
    backbone = randomize_(TimmBackbone(TimmBackboneConfig("tresnet_m", out_indices=[1, 4])))
    upstream = timm.create_model("tresnet_m", features_only=True, out_indices=(1, 4)).eval()
    upstream.load_state_dict(backbone._backbone.state_dict())
    assert_equals_upstream(backbone(PIXELS).feature_maps, upstream(PIXELS))
    backbone.out_indices = [0]
    with pytest.raises(ValueError, match="stage '' is not there: timm has no feature for it"):
        backbone(PIXELS)


@torch.no_grad()
def test_attention_replaced_in_timms_swin_runs_in_timms_own_forward():
    kwargs = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 2, 3, 4)}
    config = TimmBackboneConfig("swin_tiny_patch4_window7_224", backbone_kwargs=kwargs)
    backbone = TimmBackbone(config).eval()

    class Zero(torch.nn.Module):
        def forward(self, x, mask=None):
            return torch.zeros_like(x)

    before = backbone(PIXELS).feature_maps[0]
    backbone._backbone.layers_0.blocks[0].attn = Zero()  # type: ignore[union-attr]  # timm's names
    after = backbone(PIXELS).feature_maps[0]
    upstream = backbone._backbone(PIXELS)[-1].permute(0, 3, 1, 2)  # type: ignore[operator]
    assert torch.equal(after, upstream) and not torch.equal(after, before)
