"""Measured launch configurations: those of the package first, then those of the cache."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from broken_kernels import self_check

from fastbb_kernels import _dispatch, launching, measured
from fastbb_kernels._dispatch import pretend
from fastbb_kernels.launching import chosen_config, configured_as_on, forced
from fastbb_kernels.measured import SECTION, config_path, write_configs
from fastbb_kernels.self_check import SelfCheck, use
from fastbb_kernels.triton_kernels import (
    bottleneck_tail,
    conv1x1_bn_act,
    conv3x3_bn_act,
    depthwise_conv_bn_act,
    layer_norm_linear,
    layer_norm_nchw,
    linear_residual,
    patch_embed,
    stem_conv_bn_relu_pool,
    swin_attention_block,
    swin_mlp_block,
    window_attention,
)

CUDA = torch.device("cuda:1")
TABLE = "tiles"
NAME = "Pretended GPU"


class Tile(NamedTuple):
    rows: int
    cols: int


class Config(NamedTuple):
    tile: Tile
    resident: bool
    options: dict[str, int]


USUAL = Config(Tile(64, 64), False, {})


def launch_config(n_rows: int, features: int, dtype: torch.dtype, arch: Any) -> Config:
    return USUAL


def entry(n_rows: int, features: int = 96, rows: int = 128, **other: Any) -> dict[str, Any]:
    sizes = {"n_rows": n_rows, "features": features, "dtype": "bfloat16"}
    return {"sizes": sizes, "config": [[rows, 32], True, {"maxnreg": 192}], "us": 3.5, **other}


def chosen(n_rows: int, features: int = 96, dtype: torch.dtype = torch.bfloat16) -> Config:
    return chosen_config(TABLE, launch_config, CUDA, n_rows, features, dtype)


@pytest.fixture(autouse=True)
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SelfCheck]:
    """A GPU of which nothing is known, and an empty package."""
    monkeypatch.setattr(measured, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(launching, "architecture", lambda device: 90)
    check = self_check(tmp_path / "cache")
    with use(check):
        forget()
        yield check
    forget()


@contextmanager
def pretend_only(check: SelfCheck) -> Iterator[None]:
    """A machine with this check, on which another GPU is pretended."""
    installed, own = _dispatch._installed_check, _dispatch._own_check
    _dispatch._installed_check, _dispatch._own_check = None, check
    try:
        with pretend(90):
            assert _dispatch.current_check() is None
            yield
    finally:
        _dispatch._installed_check, _dispatch._own_check = installed, own


def forget() -> None:
    """As another process."""
    measured.forget()


def test_nothing_was_measured() -> None:
    assert chosen(1000) is USUAL


def test_what_was_measured_runs() -> None:
    path = write_configs(NAME, {TABLE: [entry(1000)]}, {"torch": "2.14"})
    assert path.name == "pretended-gpu.json" and path == config_path(NAME)
    assert json.loads(path.read_text())["device"] == NAME
    forget()
    config = chosen(1000)
    assert config == Config(Tile(128, 32), True, {"maxnreg": 192})
    assert isinstance(config, Config) and isinstance(config.tile, Tile)
    # other sizes were not measured
    assert chosen(1000, features=192) is USUAL
    assert chosen(1000, dtype=torch.float32) is USUAL


def test_a_measured_config_holds_for_half_to_twice_its_rows() -> None:
    write_configs(NAME, {TABLE: [entry(1000, rows=16), entry(3000, rows=32)]}, {})
    rows = {n: chosen(n).tile.rows for n in (499, 500, 1000, 1700, 1800, 3000, 6000, 6001)}
    assert rows == {499: 64, 500: 16, 1000: 16, 1700: 16, 1800: 32, 3000: 32, 6000: 32, 6001: 64}


def test_the_package_comes_before_the_cache(check: SelfCheck) -> None:
    check.cache(CUDA).put(SECTION, TABLE, [entry(1000, rows=16)])
    assert chosen(1000).tile.rows == 16
    write_configs(NAME, {TABLE: [entry(1000, rows=32)]}, {})
    forget()
    assert chosen(1000).tile.rows == 32
    assert chosen(400).tile.rows == 64


def test_a_forced_config_wins_over_both() -> None:
    write_configs(NAME, {TABLE: [entry(1000)]}, {})
    other = USUAL._replace(resident=True)
    with forced({TABLE: other}):
        assert chosen(1000) is other
    assert chosen(1000).tile.rows == 128


UNUSABLE = {
    "torn": '{"configs": {',
    "a list": "[]",
    "no tables": '{"device": "x"}',
    "tables of another kind": json.dumps({"configs": [1]}),
    "an entry of another kind": json.dumps({"configs": {TABLE: [3, {}, {"sizes": 1}]}}),
    "no configuration": json.dumps({"configs": {TABLE: [{**entry(1000), "config": None}]}}),
    "too few values": json.dumps({"configs": {TABLE: [{**entry(1000), "config": [[1, 2], True]}]}}),
    "a float": json.dumps({"configs": {TABLE: [{**entry(1000), "config": [[1, 2.0], True, {}]}]}}),
    "rows of another kind": json.dumps({"configs": {TABLE: [entry("many")]}}),  # pyright: ignore[reportArgumentType] - on purpose
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_cannot_be_used_is_ignored(text: str, check: SelfCheck) -> None:
    path = config_path(NAME)
    path.parent.mkdir()
    path.write_text(text)
    assert chosen(1000) is USUAL


def test_pretended_devices_know_nothing_measured() -> None:
    """What is compiled for an architecture does not depend on one GPU of it."""
    write_configs(NAME, {TABLE: [entry(1000)]}, {})
    cpu = torch.device("cpu")
    assert chosen_config(TABLE, launch_config, cpu, 1000, 96, torch.bfloat16) is USUAL


def test_what_is_compiled_for_a_gpu_takes_what_was_measured_on_it() -> None:
    write_configs(NAME, {TABLE: [entry(1000)]}, {})
    cpu = torch.device("cpu")
    with configured_as_on(CUDA):
        config = chosen_config(TABLE, launch_config, cpu, 1000, 96, torch.bfloat16)
    assert config.tile.rows == 128


def test_a_cached_config_is_used_there_too(check: SelfCheck) -> None:
    """Though a pretended GPU has no check, and what is read once is kept."""
    check.cache(CUDA).put(SECTION, TABLE, [entry(1000, rows=16)])
    cpu = torch.device("cpu")
    with pretend_only(check), configured_as_on(CUDA):
        config = chosen_config(TABLE, launch_config, cpu, 1000, 96, torch.bfloat16)
    assert config.tile.rows == 16
    assert chosen(1000).tile.rows == 16


SIZES: dict[Any, tuple[Any, ...]] = {
    bottleneck_tail: (3136, 64),
    conv1x1_bn_act: (3136, 64, 256, True, torch.bfloat16, False),
    conv3x3_bn_act: (3136, 64, 64, torch.bfloat16),
    depthwise_conv_bn_act: (96, torch.bfloat16),
    layer_norm_linear: (3136, 96, 288, torch.bfloat16, False),
    layer_norm_nchw: (3136, 96),
    linear_residual: (3136, 384, 96, torch.bfloat16),
    patch_embed: (48, 96, torch.bfloat16),
    stem_conv_bn_relu_pool: (3, 64, torch.bfloat16, torch.bfloat16, "relu"),
    swin_attention_block: (96,),
    swin_mlp_block: (3136, 96),
    window_attention: (49, 32, torch.bfloat16),
}


@pytest.mark.parametrize("module", SIZES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_configuration_survives_json(module: Any, check: SelfCheck) -> None:
    """What a sweep writes is what a launch reads."""
    usual = module.launch_config(*SIZES[module], 90)
    names = module.launch_config.__annotations__
    sizes = measured.plain_sizes(dict(zip(names, SIZES[module])))
    check.cache(CUDA).put(SECTION, TABLE, [{"sizes": sizes, "config": usual}])
    seen = []

    @wraps(module.launch_config)
    def other(*args: Any) -> Any:
        seen.append(args)
        return usual

    config = chosen_config(TABLE, other, CUDA, *SIZES[module])
    assert config == usual and config is not usual and type(config) is type(usual)
    assert seen == [(*SIZES[module], 90)]
