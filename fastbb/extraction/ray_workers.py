"""Workers that are actors of Ray: each keeps its model, and each shard is one task of its.

Actors write shards and commits themselves, so the features directory, the images and the model's
cache are at the same paths on every node.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from .pool import Ended
from .worker import Message, Start, WorkerServer

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class RayOptions:
    """A cluster of Ray, and what workers take of it.

    Attributes:
        address: of the cluster, see `ray.init`; None: that of RAY_ADDRESS or the one that runs on
            this machine, else one is started on this machine for the run.
        num_gpus_per_worker: may be a part of one; default: 1 where the cluster has GPUs, else 0.
        min_workers: the first shard is handed out when so many workers are ready.
        max_workers: at most so many; default: as many as the cluster has room for.
    """

    address: str | None = None
    num_gpus_per_worker: float | None = None
    min_workers: int = 1
    max_workers: int | None = None

    def __post_init__(self) -> None:
        gpus, most = self.num_gpus_per_worker, self.max_workers
        if gpus is not None and gpus < 0:
            raise ValueError(f"num_gpus_per_worker: wanted at least 0, got {gpus}")
        if self.min_workers < 1 or (most is not None and most < self.min_workers):
            raise ValueError(
                "min_workers: wanted at least 1, and at most max_workers, got "
                f"{self.min_workers} and {most}"
            )


class MissingRayError(ImportError):
    """Ray is not installed."""

    exit_code = 2  # of a command: the same as of a wrong argument


class ShardWorker:
    """An actor; its name is what Ray shows of its process."""

    def __init__(self) -> None:
        self._server = WorkerServer()

    def answer(self, request: Message) -> Iterator[Message]:
        """Yields the answers to a request."""
        yield from self._server.answer(request)


class RayWorker:
    """An actor of the cluster."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.answers: Any = None  # generator of the last request

    def ask(self, request: Message) -> None:
        self.answers = self.actor.answer.options(num_returns="streaming").remote(request)

    def close(self) -> None:
        import ray

        with suppress(Exception):  # of a cluster that has gone
            ray.kill(self.actor)


class RayActors:
    """A `Backend` of actors; connects to the cluster.

    Args:
        options: of the command.
        start: how each begins, but for device and threads.
        plan: of the directory, or None for a first start.
        device: "cpu", "cuda", or None: GPUs where the cluster has some.
        say: shows a line.

    Raises:
        MissingRayError: Ray is not installed.
        OSError: there is no such cluster.
        ValueError: the cluster has no room for a worker, or not for the device.
    """

    def __init__(
        self,
        options: RayOptions,
        start: Start,
        plan: Mapping[str, Any] | None,
        device: str | None,
        say: Callable[[str], None],
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingRayError("ray: needs Ray; pip install 'fastbb[ray]'") from error
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            say(f"connecting to Ray{'' if options.address is None else f' at {options.address}'}")
            _connect(options.address)
        resources = ray.cluster_resources()
        has_gpus = bool(resources.get("GPU")) and device != "cpu"
        gpus = options.num_gpus_per_worker
        gpus = float(has_gpus) if gpus is None else gpus
        if device is not None and (device == "cuda") != bool(gpus):
            self.close()
            raise ValueError(
                f"ray: device {device!r} does not go with {gpus:g} GPUs for each worker "
                f"(num_gpus_per_worker; the cluster has {resources.get('GPU', 0):g})"
            )
        # of a plan of the CPU the features depend on the number of threads
        threads = None if gpus else (plan or {}).get("threads", 1)
        self._resources = {"num_cpus": threads or 1, "num_gpus": gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(_room(node, self._resources) for node in nodes)
        n = options.max_workers or max(room, options.min_workers)
        if not room:
            self.close()
            have = {name: resources.get(name, 0) for name in ("CPU", "GPU")}
            raise ValueError(
                f"ray: a worker needs {self._resources['num_cpus']} CPUs and {gpus:g} GPUs "
                f"(num_gpus_per_worker), and the cluster has {have['CPU']:g} and {have['GPU']:g}"
            )
        self.min_ready = options.min_workers
        n_sharers = math.ceil(n / max(1, len(nodes)))
        start = replace(start, device="cuda" if gpus else "cpu")
        self.starts: Sequence[Start] = [replace(start, threads=threads, n_sharers=n_sharers)] * n

    def start(self) -> RayWorker:
        import ray

        # a dead actor is replaced by the pool, which knows its shard
        return RayWorker(ray.remote(**self._resources)(ShardWorker).remote())  # type: ignore[attr-defined]  # made by ray

    def wait(
        self, workers: Sequence[RayWorker], timeout_s: float
    ) -> list[tuple[RayWorker, Message | Ended]]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        worker_of = {worker.answers: worker for worker in workers if worker.answers is not None}
        if not worker_of:
            time.sleep(timeout_s)
            return []
        waited: Any = ray.wait([*worker_of], num_returns=1, timeout=timeout_s)
        heard: list[tuple[RayWorker, Message | Ended]] = []
        for answers in waited[0]:
            worker = worker_of[answers]
            try:
                answer: Any = ray.get(next(answers))
                heard.append((worker, answer))
            except StopIteration:
                worker.answers = None
            except RayTaskError:  # a defect
                raise
            except RayError as error:  # it died, or its node, or Ray killed it for memory
                worker.answers = None
                heard.append((worker, Ended(_shortened(error))))
        return heard

    def close(self) -> None:
        import ray

        if self._is_ours:
            ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, ValueError) as error:
        raise OSError(f"ray: no cluster at {address or 'RAY_ADDRESS'}: {error}") from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _room(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """Number of workers that a node has room for."""
    asked = {"CPU": wanted["num_cpus"], "GPU": wanted["num_gpus"]}
    # Ray counts in steps of 1e-4; 1 // 0.1 is 9
    return int(min(node.get(name, 0) / n + 1e-4 for name, n in asked.items() if n))


def _shortened(error: Exception) -> str:
    """What a user needs of Ray's long text: how it begins, and the last line."""
    lines = [line for line in _ANSI.sub("", str(error)).splitlines() if line.strip()] or [""]
    first = lines[0].split(". ")[0]
    return first if len(lines) == 1 else f"{first} ... {lines[-1].strip()}"
