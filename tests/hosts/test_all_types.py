"""Every model type of transformers' AutoBackbone loads, and computes what upstream computes."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from reference_models import images, randomize_
from tiny_types import AROUND, FIELDS, config, upstream
from tolerance import assert_equals_upstream

from fastbb import AutoBackbone, AutoConfig, TransformersBackbone
from fastbb.auto import list_types
from fastbb.hosts.model_types import BACKBONE_TYPES
from fastbb_kernels.accuracy import FP32_REL

transformers = pytest.importorskip("transformers")

PIXELS = images(32, 32)
# from a table of its own: dinat needs NATTEN, timm's backbone is tested with timm, and a
# checkpoint of tipsv2 loads as its vision model
ELSEWHERE = {"dinat", "timm_backbone", "tipsv2"}


def maps(backbone: Any, pixels: torch.Tensor = PIXELS) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(backbone(pixels).feature_maps)


def same(ours: Any, theirs: Any, pixels: torch.Tensor = PIXELS) -> None:
    for x, y in zip(maps(ours, pixels), maps(theirs, pixels), strict=True):
        assert_equals_upstream(x, y, FP32_REL)


def test_the_table_has_the_types_of_transformers() -> None:
    mapping: Any = transformers.AutoBackbone._model_mapping
    theirs = {c.model_type: cls.__name__ for c, cls in mapping.items()}
    assert {name: known.backbone for name, known in BACKBONE_TYPES.items()} == theirs
    assert len(theirs) == 32 and set(FIELDS) == set(theirs) - ELSEWHERE


@pytest.mark.parametrize("model_type", sorted(FIELDS))
def test_a_checkpoint_loads_from_the_hub_and_goes_back(
    model_type: str, hub: HubServer, tmp_path: Path
) -> None:
    theirs = upstream(model_type)
    theirs.save_pretrained(tmp_path / "theirs")
    hub.add_repo("acme/tiny", tmp_path / "theirs")
    ours = AutoBackbone.from_pretrained("acme/tiny")
    assert not ours.training and ours.config.model_type == model_type
    assert ours.stage_names == list(theirs.stage_names)
    assert ours.out_features == list(theirs.out_features)
    same(ours, theirs)
    for m, channels in zip(maps(ours), ours.channels, strict=True):
        assert channels == m.shape[1 if m.ndim == 4 else 2]

    ours.save_pretrained(tmp_path / "ours")
    same(type(theirs).from_pretrained(tmp_path / "ours").eval(), theirs)
    with hub.offline():
        again = AutoBackbone.from_pretrained("acme/tiny", out_indices=[-2], dtype="bfloat16")
    assert again.out_features == ours.stage_names[-2:-1] and again.dtype == torch.bfloat16
    assert AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path / "ours")).stage_names


@pytest.mark.parametrize("name", sorted(AROUND))
def test_a_backbone_inside_another_model_is_found(name: str, tmp_path: Path) -> None:
    model = AROUND[name]()
    model.save_pretrained(tmp_path)
    (theirs,) = (m for m in model.modules() if type(m).__name__.endswith("Backbone"))
    ours, info = AutoBackbone.from_pretrained(tmp_path, output_loading_info=True)
    same(ours, theirs, images(32, 32, channels=ours.config.num_channels))
    assert info.prefix and info.ignored


def test_a_classifier_has_its_base_models_prefix(tmp_path: Path) -> None:
    randomize_(transformers.HieraForImageClassification(config("hiera"))).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="The checkpoint has no norm for stage2"):
        ours, info = AutoBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert info.prefix == "hiera." and "classifier.weight" in info.ignored
    theirs = transformers.HieraBackbone.from_pretrained(tmp_path).eval()
    theirs.hidden_states_norms["stage2"].reset_parameters()  # random otherwise
    same(ours, theirs)


def test_the_list_says_what_loads_each_type() -> None:
    rows = {row.model_type: row for row in list_types()}
    assert list(rows)[:32] == list(BACKBONE_TYPES)
    for name, row in rows.items():
        if name in FIELDS:
            built = AutoBackbone.from_config(config(name))
            assert type(built).__name__ == row.loads_as
        assert row.is_native == (row.loads_as not in ("TransformersBackbone", "TimmBackbone"))
        assert row.needs.startswith("transformers>=") == (row.loads_as == "TransformersBackbone")
    assert rows["pp_lcnet_v4"].needs == "transformers>=5.10"
    assert [row.model_type for row in list_types("swin*")] == ["swin", "swinv2"]


def test_dinat_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (None, "0.21.0"):
        found: Any = importlib.metadata.version

        def installed(name: str, version: Any = version, found: Any = found) -> str:
            if name != "natten":
                return found(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", installed)
        with pytest.raises(ImportError, match=f"NATTEN below 0.20.*installed is {version or 'no'}"):
            AutoConfig.for_model("dinat")
        monkeypatch.undo()


def test_a_newer_transformers_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping: Any = transformers.CONFIG_MAPPING
    monkeypatch.setattr(
        mapping, "_mapping", {k: v for k, v in mapping._mapping.items() if k != "sapiens2"}
    )
    with pytest.raises(ImportError, match=r"'sapiens2' needs transformers 5\.10 or later, install"):
        AutoConfig.for_model("sapiens2")


def test_the_vision_model_of_a_bigger_configuration_is_taken() -> None:
    fields = {**FIELDS["tipsv2_vision_model"]}
    found = AutoConfig.for_model("tipsv2", vision_config=fields, out_indices=[1])
    assert found.model_type == "tipsv2_vision_model" and found.out_features == ["stage1"]
    assert isinstance(AutoBackbone.from_config(found), TransformersBackbone)
