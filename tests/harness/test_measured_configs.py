"""Measured launch configurations: those of the package first, then those of the cache."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from broken_kernels import self_check

from fastbb_kernels import _dispatch, launching, linear_residual, measured
from fastbb_kernels._dispatch import pretend
from fastbb_kernels.cases import checked_cases
from fastbb_kernels.launching import chosen_config, configured_as_on, forced
from fastbb_kernels.measured import SECTION, config_path, write_configs
from fastbb_kernels.op import find_op, op_names
from fastbb_kernels.self_check import SelfCheck, use
from fastbb_kernels.testing import record_launches

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
    """A GPU without any results, and a package without configurations."""
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
    """A machine with this check, on which a GPU is pretended."""
    installed, own = _dispatch._installed_check, _dispatch._own_check
    _dispatch._installed_check, _dispatch._own_check = None, check
    try:
        with pretend(90):
            assert _dispatch.current_check() is None
            yield
    finally:
        _dispatch._installed_check, _dispatch._own_check = installed, own


def forget() -> None:
    """Forgets what was read, as a new process."""
    measured.forget()


def test_default_config_is_used_if_nothing_was_measured() -> None:
    assert chosen(1000) is USUAL


def test_measured_config_is_used_for_its_sizes() -> None:
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


def test_package_config_wins_over_a_cached_config(check: SelfCheck) -> None:
    check.cache(CUDA).put(SECTION, TABLE, [entry(1000, rows=16)])
    assert chosen(1000).tile.rows == 16
    write_configs(NAME, {TABLE: [entry(1000, rows=32)]}, {})
    forget()
    assert chosen(1000).tile.rows == 32
    assert chosen(400).tile.rows == 64


def test_forced_config_wins_over_package_and_cache() -> None:
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


def test_pretended_devices_use_the_default_config() -> None:
    """Code compiled for an architecture does not depend on one GPU of that architecture."""
    write_configs(NAME, {TABLE: [entry(1000)]}, {})
    cpu = torch.device("cpu")
    assert chosen_config(TABLE, launch_config, cpu, 1000, 96, torch.bfloat16) is USUAL


def test_compiling_for_a_named_gpu_uses_its_measured_config() -> None:
    write_configs(NAME, {TABLE: [entry(1000)]}, {})
    cpu = torch.device("cpu")
    with configured_as_on(CUDA):
        config = chosen_config(TABLE, launch_config, cpu, 1000, 96, torch.bfloat16)
    assert config.tile.rows == 128


def test_compiling_for_a_named_gpu_uses_its_cached_config(check: SelfCheck) -> None:
    """The pretended GPU has no check of its own, and a config that was read is kept."""
    check.cache(CUDA).put(SECTION, TABLE, [entry(1000, rows=16)])
    cpu = torch.device("cpu")
    with pretend_only(check), configured_as_on(CUDA):
        config = chosen_config(TABLE, launch_config, cpu, 1000, 96, torch.bfloat16)
    assert config.tile.rows == 16
    assert chosen(1000).tile.rows == 16


@pytest.mark.parametrize("op", op_names())
def test_every_configuration_survives_json(op: str, check: SelfCheck) -> None:
    """A launch reads the configuration that a sweep wrote."""
    case = next(case for case in checked_cases() if case.op == op)
    with (
        record_launches(90),
        torch.no_grad(),
        mock.patch.object(launching, "unforced_config", wraps=measured.unforced_config) as asked,
    ):
        find_op(op).call(**case.arguments("meta", torch.bfloat16), impl="triton")
    assert asked.called
    for (table, launch_config, _, arch, sizes), _ in asked.call_args_list:
        usual = launch_config(*sizes, arch)
        named = dict(zip(inspect.signature(launch_config).parameters, sizes))
        entry = {"sizes": measured.plain_sizes(named), "config": usual}
        check.cache(CUDA).put(SECTION, table, [entry])
        forget()
        config = measured.unforced_config(table, launch_config, CUDA, arch, sizes)
        assert config == usual and config is not usual and type(config) is type(usual)


def test_gpus_of_one_architecture_use_their_own_measured_configs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uses the example file of the README; entries that it lacks come from the architecture."""
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    h100, h200 = (torch.device("cuda", index) for index in range(2))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    readme = Path(measured.__file__).parents[1] / "README.md"
    text = readme.read_text().partition("```json\n")[2].partition("```")[0]
    assert json.loads(text)["device"] == names[1]
    for name in names:
        assert f'`configs/{config_path(name).name}` for "{name}"' in " ".join(
            readme.read_text().split()
        )
    config_path(names[1]).parent.mkdir()
    config_path(names[1]).write_text(text)

    def tile(device: torch.device, features: int = 384) -> tuple[int, int]:
        args = [
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in ((200_704, features), (96, features), (96,), (200_704, 96))
        ]
        with record_launches(90) as recording, torch.no_grad(), configured_as_on(device):
            linear_residual(*args, impl="triton")
        (launch,) = recording.launches
        return launch.constexprs["BLOCK_M"], launch.constexprs["BLOCK_N"]

    usual = (128, 128)
    assert tile(h200) == (128, 64) and tile(h100) == usual
    assert tile(h200, features=192) == usual
