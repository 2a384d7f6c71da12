"""Which workers compute the shards of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .local_workers import Processes
from .locks import MAX_SHARES
from .pool import Backend
from .ray_workers import RayActors, RayOptions
from .worker import Start


@dataclass(frozen=True)
class Workers:
    """What a command says about its workers.

    Attributes:
        n: processes on the CPU.
        devices: a process for each; "cuda:0" ...
        ray: on a cluster of Ray.
    """

    n: int | None = None
    devices: tuple[str, ...] = ()
    ray: RayOptions | None = None

    @classmethod
    def parse(
        cls,
        workers: int | None,
        devices: str | Sequence[int | str] | None,
        ray: RayOptions | None,
        device: object | None,
        record_crashes: bool = False,
    ) -> Workers | None:
        """Returns the workers that are asked for; None for none.

        Args:
            workers: see `extract`, as are the others.
            devices: see `extract`.
            ray: see `extract`.
            device: of the model, or None.
            record_crashes: see `extract`.

        Raises:
            ValueError: they do not go together, or there are no such devices.
        """
        given = {"workers": workers, "devices": devices, "ray": ray}
        names = [name for name, value in given.items() if value is not None]
        if not names:
            if record_crashes:
                raise ValueError(
                    "record_crashes: it is for workers, whose crashes do not end the run; give "
                    "workers, devices or ray (--workers, --devices, --ray)"
                )
            return None
        if len(names) > 1:
            raise ValueError(f"{names[1]}: it does not go with {names[0]}; give one of them")
        if devices is not None:
            if device is not None:
                raise ValueError("devices: it does not go with device; give one of them")
            return cls(devices=_device_names(devices))
        if workers is not None:
            if not isinstance(workers, int) or workers < 1:
                raise ValueError(f"workers: wanted a whole number, at least 1, got {workers!r}")
            if str(device or "cpu") != "cpu":
                raise ValueError("workers: they are for the CPU; for GPUs give devices (--devices)")
        if ray is not None and str(device or "cpu") not in ("cpu", "cuda"):
            raise ValueError(
                f"device: with ray wanted 'cpu' or 'cuda', as Ray gives each worker its GPU, got "
                f"{str(device)!r}"
            )
        return cls(workers, ray=ray)

    def backend(
        self, start: Start, plan: Mapping[str, Any] | None, say: Callable[[str], None]
    ) -> Backend:
        """Returns what starts and hears the workers.

        Args:
            start: how each begins, but for device and threads.
            plan: of the directory, or None for a first start.
            say: shows a line.

        Raises:
            ValueError: workers of the CPU for what would run on a GPU.
        """
        device = start.said.get("device") or (plan or {}).get("device")
        if self.ray is not None:
            return RayActors(self.ray, start, plan, device, say)
        if self.devices:
            start = replace(start, n_sharers=len(self.devices))
            return Processes([replace(start, device=device) for device in self.devices])
        assert self.n is not None
        if (device or ("cuda" if torch.cuda.is_available() else "cpu")) != "cpu":
            raise ValueError(
                "workers: they are for the CPU, and this would run on a GPU: give devices "
                "(--devices all), or device='cpu' (--device cpu) as well"
            )
        n, n_cores = self.n, len(os.sched_getaffinity(0))
        threads = (plan or {}).get("threads") or max(1, n_cores // n)
        if n > (most := max(1, n_cores // threads)):
            say(
                f"{most} instead of {n} workers: the plan gives each {threads} torch threads, and "
                f"there are {n_cores} cores"
                if plan
                else f"{most} instead of {n} workers: there are {n_cores} cores"
            )
            n = most
        return Processes([replace(start, device="cpu", threads=threads, n_sharers=n)] * n)


def _device_names(devices: str | Sequence[int | str]) -> tuple[str, ...]:
    n_gpus = torch.cuda.device_count()
    if not n_gpus:
        raise ValueError("devices: wanted GPUs, and torch finds none; on a CPU give workers")
    if devices == "all":
        return tuple(f"cuda:{i}" for i in range(n_gpus))
    wanted = devices.split(",") if isinstance(devices, str) else devices
    numbers = [str(device).strip().removeprefix("cuda:") for device in wanted]
    known = {str(i) for i in range(n_gpus)}
    if not numbers or not known.issuperset(numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"devices: wanted 'all' or different ones of 0 to {n_gpus - 1}, got {devices!r}"
        )
    return tuple(f"cuda:{number}" for number in numbers)


def parse_share(shard_index: str | Sequence[int]) -> tuple[int, int]:
    """Returns (i, n) of a shard index "i/n".

    Raises:
        ValueError: it is something else.
    """
    parts = shard_index.split("/") if isinstance(shard_index, str) else shard_index
    try:
        i, n = (int(part) for part in parts)
        if 0 <= i < n < MAX_SHARES:
            return i, n
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"shard_index: wanted i/n with i from 0 to n - 1, such as 0/4, got {shard_index!r}"
    )
