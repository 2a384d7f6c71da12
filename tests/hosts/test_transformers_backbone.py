"""TransformersBackbone: what it mends of upstream, its options, its errors."""

import json
import pickle
import sys
import warnings
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hub_server import HubServer
from reference_models import images, randomize_
from safetensors.torch import load_file, save_file
from tiny_types import FIELDS, config, upstream
from tolerance import assert_equals_upstream

from fastbb import AutoBackbone, AutoConfig
from fastbb.backbone.hub import ConfigFile
from fastbb.extraction.models import BackboneModel
from fastbb_kernels.accuracy import FP32_REL

transformers = pytest.importorskip("transformers")

PIXELS = images(32, 32)


def maps(backbone: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(backbone(PIXELS).feature_maps)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def focalnet(tmp_path: Path) -> Any:
    return AutoBackbone.from_pretrained(saved(upstream("focalnet"), tmp_path / "focalnet"))


# --- upstream's defects, beside upstream


def test_default_configuration_of_focalnet_builds() -> None:
    theirs = transformers.FocalNetConfig()
    with pytest.raises(TypeError, match="can only concatenate list"), torch.device("meta"):
        transformers.AutoBackbone.from_config(theirs)
    with torch.device("meta"):
        assert AutoBackbone.from_config(theirs).channels == [768]


def test_stages_of_hiera_may_change(tmp_path: Path) -> None:
    theirs = upstream("hiera")
    ours = AutoBackbone.from_pretrained(saved(theirs, tmp_path))
    theirs.out_features = ["stage1"]
    with pytest.raises(KeyError, match="stage1"):
        theirs(PIXELS)
    with pytest.warns(UserWarning, match="The checkpoint has no norm for stage1"):
        ours.out_features = ["stage1", "stage2"]
    first, second = maps(ours)
    want = upstream("hiera", out_features=["stage1", "stage2"])
    want.load_state_dict(theirs.state_dict(), strict=False)
    torch.nn.init.ones_(want.hidden_states_norms["stage1"].weight)
    torch.nn.init.zeros_(want.hidden_states_norms["stage1"].bias)
    for ours_map, theirs_map in zip((first, second), maps(want), strict=True):
        assert_equals_upstream(ours_map, theirs_map, FP32_REL)
    ours.out_features = ["stage2"]  # norms of other stages are not written
    ours.save_pretrained(tmp_path / "again")
    names = load_file(tmp_path / "again" / "model.safetensors")
    assert {n for n in names if "norms" in n} == {
        f"hidden_states_norms.stage2.{p}" for p in ("weight", "bias")
    }


def test_final_norm_of_pixio_is_loaded(tmp_path: Path) -> None:
    made = randomize_(transformers.PixioModel(config("pixio")))
    folder = saved(made, tmp_path / "model")
    exact = made(PIXELS).last_hidden_state[:, 2:].transpose(1, 2).reshape(2, 32, 4, 4).detach()
    theirs = transformers.PixioBackbone.from_pretrained(folder).eval()
    assert not torch.allclose(maps(theirs)[0], exact, atol=1e-3)  # its norm is not loaded
    ours = AutoBackbone.from_pretrained(folder)
    assert_equals_upstream(maps(ours)[0], exact, FP32_REL)

    backbone = upstream("pixio")
    folder = saved(backbone, tmp_path / "backbone")
    again = transformers.PixioBackbone.from_pretrained(folder).eval()
    assert not torch.allclose(maps(again)[0], maps(backbone)[0], atol=1e-3)  # norms are swapped
    ours = AutoBackbone.from_pretrained(folder)
    assert_equals_upstream(maps(ours)[0], maps(backbone)[0], FP32_REL)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("hgnet_v2", {}), ("pp_lcnet", {"scale": 0.7}), ("uvdoc_backbone", {})],
)
def test_channels_are_those_of_the_maps(model_type: str, fields: dict[str, Any]) -> None:
    theirs = upstream(model_type, **fields)
    ours = AutoBackbone.from_config(theirs.config)
    ours.out_indices = list(range(len(ours.stage_names)))
    found = [m.shape[1] for m in maps(ours.eval())]
    assert ours.channels == found != list(theirs.num_features)


# --- its options


def test_hidden_states_and_tuples_are_upstreams(tmp_path: Path, focalnet: Any) -> None:
    theirs = transformers.FocalNetBackbone.from_pretrained(tmp_path / "focalnet").eval()
    with torch.no_grad():
        got, want = (model(PIXELS, output_hidden_states=True) for model in (focalnet, theirs))
        chosen = focalnet(PIXELS, output_hidden_states=[1]).hidden_states
        (only,) = focalnet(PIXELS, return_dict=False)
    for name in ("feature_maps", "hidden_states"):
        for x, y in zip(got[name], want[name], strict=True):
            assert torch.equal(x, y), name
    assert [state is None for state in chosen] == [True, False, True]
    assert torch.equal(only[0], got.feature_maps[0])


def test_attentions_are_upstreams(tmp_path: Path) -> None:
    theirs = upstream("vitdet")
    ours = AutoBackbone.from_pretrained(saved(theirs, tmp_path))
    with torch.no_grad():
        got, want = (model(PIXELS, output_attentions=True).attentions for model in (ours, theirs))
    assert want
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_flags_of_upstream_are_kept(tmp_path: Path) -> None:
    theirs = upstream("tipsv2_vision_model", reshape_hidden_states=False, out_indices=[1, 3])
    ours = AutoBackbone.from_pretrained(saved(theirs, tmp_path))
    for x, y in zip(maps(ours), maps(theirs), strict=True):
        assert x.ndim == 3 and torch.equal(x, y)
    plain = AutoBackbone.from_pretrained(tmp_path, apply_layernorm=False)
    assert not torch.allclose(maps(plain)[0], maps(ours)[0])
    with pytest.raises(TypeError, match="'tipsv2_vision_model' has no field apply_layernrm; its f"):
        AutoBackbone.from_pretrained(tmp_path, apply_layernrm=False)


def test_class_tokens_are_returned(tmp_path: Path) -> None:
    theirs = upstream("sapiens2", return_class_token=True)
    folder = saved(theirs, tmp_path)
    ours = AutoBackbone.from_pretrained(folder, return_class_token=True).prepare()
    with torch.no_grad():
        assert torch.equal(ours(PIXELS).cls_tokens[0], theirs(PIXELS).cls_tokens[0])


def test_copies_may_return_other_stages(focalnet: Any) -> None:
    from fastbb.engine.computation import without_engine

    other = without_engine(focalnet)
    other.out_features = ["stem", "stage1"]
    assert len(maps(other)) == 2 and len(maps(focalnet)) == 1
    assert torch.equal(maps(pickle.loads(pickle.dumps(other)))[1], maps(other)[1])


def test_hooks_of_upstream_keep_no_backbone_from_its_engine() -> None:
    pixio: Any = AutoBackbone.from_config(config("pixio")).eval()
    assert any(m._forward_hooks for m in pixio.modules())  # capture hidden states
    prepared = pixio.prepare()
    assert torch.equal(maps(prepared)[0], maps(pixio)[0])
    assert "hooks" not in str(prepared.explain())
    handle = pixio.model.pixio.register_forward_hook(lambda *_: None)
    maps(prepared)
    assert "layers have hooks" in str(prepared.explain())
    handle.remove()


def test_verify_holds_it_to_upstream(focalnet: Any) -> None:
    report = focalnet.verify(inputs=PIXELS)
    assert report.passed and "FocalNetBackbone" in report.reference
    with torch.no_grad():
        bias = focalnet.model.focalnet.embeddings.norm.bias
        bias.add_(1)  # of ours and of upstream's, which gets it
    assert focalnet.verify(inputs=PIXELS).passed

    def wrong(module: Any, args: Any, output: Any) -> Any:
        output.feature_maps = tuple(m * 1.001 for m in output.feature_maps)
        return output

    focalnet.model.register_forward_hook(wrong)
    assert not focalnet.verify(inputs=PIXELS).passed


def test_gradients_and_training_reach_upstreams_parameters(focalnet: Any) -> None:
    focalnet.train()
    focalnet(PIXELS).feature_maps[0].sum().backward()
    without = {n for n, p in focalnet.named_parameters() if p.grad is None}
    assert without == {f"model.focalnet.layernorm.{p}" for p in ("weight", "bias")}  # of no map


def test_windows_of_rf_detr_follow_the_selected_stages(tmp_path: Path) -> None:
    theirs = upstream("rf_detr_dinov2", out_indices=[1, 3])
    folder = saved(theirs, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("window_block_indexes") == [0, 2]  # [0, 1, 2] without a selection
    (folder / "config.json").write_text(json.dumps(values))
    ours = AutoBackbone.from_pretrained(folder)
    for x, y in zip(maps(ours), maps(theirs), strict=True):
        assert_equals_upstream(x, y, FP32_REL)
    assert "window_block_indexes" in ours.config.deciding_fields()


def test_outputs_that_a_configuration_asks_for_do_no_harm(tmp_path: Path) -> None:
    folder = saved(upstream("focalnet"), tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values |= {"return_dict": False, "output_hidden_states": True}
    (folder / "config.json").write_text(json.dumps(values))
    ours = AutoBackbone.from_pretrained(folder)
    with torch.no_grad():
        assert [len(part) for part in ours(PIXELS)] == [1, 3]
        only = ours(PIXELS, output_hidden_states=False, return_dict=True)
    assert list(only) == ["feature_maps"] and ours.channels == [16]
    assert ours.prepare()(PIXELS, return_dict=True).hidden_states is not None


def test_an_empty_batch_and_no_stage_give_empty_results(focalnet: Any) -> None:
    assert focalnet(PIXELS[:0]).feature_maps[0].shape == (0, 16, 4, 4)
    focalnet.config.set_output_features_output_indices([], [])
    assert focalnet(PIXELS).feature_maps == ()


def test_a_forward_of_another_library_runs_for_every_selection(focalnet: Any) -> None:
    calls, forward = [], focalnet.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return forward(*args, **kwargs)

    focalnet.model.forward = counted
    focalnet.out_features = ["stem"]
    assert maps(focalnet)[0].shape[1] == 8 and calls


def test_weights_load_inside_inference_mode(tmp_path: Path) -> None:
    folder = saved(upstream("focalnet"), tmp_path)
    with torch.inference_mode():
        ours = AutoBackbone.from_pretrained(folder)
    assert not any(p.is_inference() for p in ours.parameters())


def test_threads_that_load_leave_logging_as_it_was(tmp_path: Path) -> None:
    folder = saved(upstream("focalnet"), tmp_path)
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    threads = [Thread(target=AutoBackbone.from_pretrained, args=[folder]) for _ in range(4)]
    try:
        logging.set_verbosity_info()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert logging.get_verbosity() == 20 and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


# --- bad input


def test_missing_and_misshapen_weights_are_listed(tmp_path: Path) -> None:
    folder = saved(upstream("bit"), tmp_path)
    state = load_file(folder / "model.safetensors")
    name = "encoder.stages.0.layers.0.conv1.weight"
    save_file({n: t for n, t in state.items() if name not in n}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"do not fit BitBackbone .*missing: .*{name}"):
        AutoBackbone.from_pretrained(folder)
    key = next(n for n in state if name in n)
    save_file({**state, key: torch.zeros(1, 2, 3, 4)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"wrong shape: .*{name}.*\[1, 2, 3, 4\] in the checkpo"):
        AutoBackbone.from_pretrained(folder)
    layer = key.replace(".layers.0.", ".layers.7.")
    more = {layer: torch.zeros(1), "classifier.1.bias": torch.zeros(2)}
    save_file({**state, **more}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown: \S*layers\.7\.conv1\.weight$"):
        AutoBackbone.from_pretrained(folder)
    save_file({"other.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="The checkpoint holds no BitBackbone"):
        AutoBackbone.from_pretrained(folder)


def test_code_of_a_checkpoint_never_runs(tmp_path: Path) -> None:
    folder = saved(upstream("focalnet"), tmp_path)
    values = json.loads((folder / "config.json").read_text())
    mark = tmp_path / "ran"
    (folder / "modeling.py").write_text(f"open({str(mark)!r}, 'w')")
    values["auto_map"] = {"AutoBackbone": "modeling.Mine", "AutoConfig": "modeling.MyConfig"}
    (folder / "config.json").write_text(json.dumps(values))
    for load in (AutoBackbone.from_pretrained, AutoConfig.from_pretrained, ConfigFile.read):
        with pytest.raises(ValueError, match="needs code of its own .*fastbb runs no code"):
            load(folder)
    own = AutoConfig.for_model("focalnet", **FIELDS["focalnet"])
    assert maps(AutoBackbone.from_pretrained(folder, config=own)) and not mark.exists()


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    hiera = AutoBackbone.from_config(config("hiera"))
    with pytest.raises(
        ValueError, match="hiera takes images of its .* size only, 32x32, got 64x32"
    ):
        hiera(images(64, 32))
    vitdet = AutoBackbone.from_config(config("vitdet"))
    with pytest.raises(ValueError, match="at least one patch of 8x8 pixels, got 32x7"):
        vitdet(images(32, 7))


def test_sizes_that_windows_do_not_divide_are_refused() -> None:
    detector = AutoBackbone.from_config(config("rf_detr_dinov2"))
    with pytest.raises(ValueError, match="2x2 windows: .* divisible by 16 and 16, got 32x40"):
        detector(images(32, 40))
    detector = AutoBackbone.from_config(config("lw_detr_vit"))
    with pytest.raises(ValueError, match="2x2 windows: .* divisible by 16 and 16, got 24x32"):
        detector(images(24, 32))


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="vitpose_backbone is a mixture of experts"):
        AutoBackbone.from_config(config("vitpose_backbone", num_experts=2))


def test_configuration_that_upstream_refuses() -> None:
    with pytest.raises(ValueError, match="does not know the activation 'nope'"):
        AutoBackbone.from_config(AutoConfig.for_model("focalnet", hidden_act="nope"))
    with pytest.raises(ValueError, match="transformers refuses the configuration"):
        AutoConfig.for_model("focalnet", depths="two")


def test_without_transformers_one_sentence_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(upstream("focalnet"), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'transformers>=5\.9'"):
        AutoBackbone.from_pretrained(folder)


def test_nothing_is_printed_while_loading(
    tmp_path: Path, hub: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved(
        randomize_(transformers.FocalNetForImageClassification(config("focalnet"))), tmp_path
    )
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoBackbone.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")


def test_the_mean_of_a_map_is_an_error_where_the_backbone_returns_tokens() -> None:
    tokens: Any = AutoBackbone.from_config(config("pixio", reshape_hidden_states=False)).eval()
    with pytest.raises(ValueError, match="load it with reshape_hidden_states=True"):
        BackboneModel(tokens, pooled=tokens.out_features[-1]).features(PIXELS)
