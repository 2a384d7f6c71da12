"""Checks each kernel on the device at its first launch, and remembers the result.

On a GPU that was never tested, a kernel may be miscompiled or need more resources than there are.
So each compiled kernel is checked when it is launched for the first time: the same binary runs on
few images and is compared with PyTorch's own ops in float64. If a kernel of an op fails, PyTorch's
ops run in place of the op from then on.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._dispatch import TRITON_DTYPES, Impl, KernelWarning, input_precision
from ._dispatch import current_check as current
from ._dispatch import use_check as use
from .case import Case
from .cases import small_cases
from .comparison import (
    SEED,
    Hardware,
    NotChecked,
    case_problem,
    is_out_of_memory,
    launch_problem,
    reason_of,
    run_case,
    why_lost,
)
from .launching import FEW_IMAGES, Launch, Launched, forced, noting
from .machine import Machine
from .op import DTYPE_NAMES, find_op, op_names
from .result_cache import ResultCache
from .warning import warn_caller

__all__ = ["SelfCheck", "current", "use"]

SECTION = "self_check"
BINARIES = "binaries"  # section of the digests of correct binaries
_LIBRARY_CALLS = 4096  # remembered at most

_log = logging.getLogger(__name__)

_Key = tuple[str, torch.device, torch.dtype, str]
_Result = TypeVar("_Result")


class _CallersMemory(Exception):
    """There was not enough memory for a launch, nor for its check, so there is no result."""


class SelfCheck:
    """Checks the kernels of ops on devices, and remembers the results.

    It is thread-safe: a thread waits for a check that another thread has begun.
    """

    def __init__(
        self,
        *,
        run_case: Callable[[Case, dict[str, Any], Impl], Tensor] = run_case,
        machine_of: Callable[[torch.device], Machine] = Machine.of,
        cache_of: Callable[[Machine], ResultCache] = ResultCache,
        hardware: Hardware | None = None,
    ) -> None:
        """Makes a check without results; the arguments are for tests.

        Args:
            run_case: calls the op of a case.
            machine_of: describes the machine of a device.
            cache_of: opens the results of a machine.
            hardware: operations of devices.
        """
        self._run_case = run_case
        self._machine_of = machine_of
        self._cache_of = cache_of
        self._hardware = hardware or Hardware()
        # None: no kernel has failed
        self._problems: dict[_Key, str | None] = {}
        self._trusted: dict[_Key, set[str]] = {}
        self._libraries: dict[tuple[torch.device, Hashable], bool] = {}
        self._libraries_lock = threading.Lock()
        self._caches: dict[torch.device, ResultCache] = {}
        self._lost: dict[torch.device, str] = {}
        self._lock = threading.RLock()
        self._locks: dict[_Key, threading.Lock] = {}
        self._unsaid: list[str] = []
        self._logged: set[str] = set()

    def problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why an op's kernels are off on a device, or None; runs nothing.

        It warns of a problem that an earlier process found.

        Args:
            op: its name.
            device: where it is to run.
            dtype: of its tensors.
        """
        try:  # each call of an op pays for this; the device of a tensor needs no `_key`
            return self._problems[op, device, dtype, input_precision(dtype)]
        except KeyError:
            key = _key(op, device, dtype)
        if device.type == "meta":
            return None
        with self._lock_of(key):
            if key not in self._problems:
                found = self._remembered(key)
                self._problems[key] = found[0] if found else None
                self._report(key, remembered=True)
        self._warn()
        return self._problems.get(key)

    def known_problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns the same as `problem`, without a warning."""
        key = _key(op, device, dtype)
        if device.type == "meta":
            return None
        found = (self._problems[key],) if key in self._problems else self._remembered(key)
        return found[0] if found else None

    def launch(self, launch: Launch, args: Sequence[Any]) -> Tensor:
        """Runs a launch if its binaries are correct, else PyTorch's own ops.

        A binary is checked right after its first launch, and the result of that launch is returned
        only if the binary is correct; other threads that launch it wait. No check runs while a CUDA
        graph is captured; then PyTorch's own ops run in place of an unchecked binary.

        Args:
            launch: of an op.
            args: its arguments; the first one is a tensor on the device.

        Raises:
            Exception: an error of a launch whose binaries are correct, or lack of memory.
        """
        dtype = launch.dtype(args)
        key = launch.op, args[0].device, dtype, input_precision(dtype)
        # look it up only if something failed: every launch pays for this
        if self._problems.get(key, "") is not None and self.problem(*key[:3]) is not None:
            return launch.eager(*args)
        trusted = self._trusted.get(key) or self._trusted_of(key)
        if not trusted:
            if self._hardware.is_capturing(key[1]):
                return launch.eager(*args)
            self._hardware.synchronize(key[1])  # raises errors of earlier kernels
        y = error = None
        with noting() as launched:
            try:
                y = launch.run(*args)
            except Exception as raised:
                error = raised
        if error is None and launched.digests <= trusted:
            return y  # pyright: ignore[reportReturnType] - the check finds a result that is not a tensor
        if self._hardware.is_capturing(key[1]):
            return launch.eager(*args)
        with self._lock_of(key):
            # another thread may have checked it
            if self._problems[key] is None and (error or not launched.digests <= trusted):
                self._check(key, lambda: self._few_problem(key, launch, args, launched, error))
        self._warn()
        if self._problems.get(key) is not None:
            return launch.eager(*args)
        if error is not None:
            raise error
        assert y is not None
        return y

    def trusts(self, call: Hashable, launch: Launch, args: Sequence[Any]) -> bool:
        """Whether a library's call is correct; each process checks it the first time.

        Libraries choose a kernel by all sizes, so the check runs with all images; it compares the
        first and the last one.

        Args:
            call: arguments by which the library chooses a kernel.
            launch: runs the library.
            args: its arguments.
        """
        device = args[0].device
        key = device, call
        if key not in self._libraries:
            if self._hardware.is_capturing(device):
                return False
            with self._libraries_lock:
                if key not in self._libraries:
                    while len(self._libraries) >= _LIBRARY_CALLS:
                        self._libraries.pop(next(iter(self._libraries)))
                    self._libraries[key] = self._library_is_right(launch, args)
            self._warn()
        return self._libraries[key]

    def check(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs the small cases of an op by its kernels, whether or not they are off.

        Returns:
            a sentence that describes the problem, or None.
        """
        key = _key(op, device, dtype)
        with self._lock_of(key):
            self._check(key, lambda: self._small_problem(key))
        self._warn()
        return self._problems.get(key)

    def results(self, device: torch.device) -> dict[tuple[str, torch.dtype], str | None]:
        """Returns the problem, or None, of each op and dtype that was checked; runs nothing."""
        pairs = [(op, dtype) for op in op_names() for dtype in TRITON_DTYPES]
        found = {(op, dtype): self._remembered(_key(op, device, dtype)) for op, dtype in pairs}
        return {pair: outcome[0] for pair, outcome in found.items() if outcome}

    def cache(self, device: torch.device) -> ResultCache:
        """Returns the cache that keeps the results of a device."""
        with self._lock:
            if device not in self._caches:
                machine = self._machine_of(device)
                same = (cache for cache in self._caches.values() if cache.machine == machine)
                self._caches[device] = next(same, None) or self._cache_of(machine)
                self._log_notes(self._caches[device])
            return self._caches[device]

    def _remembered(self, key: _Key) -> tuple[str | None] | None:
        """Returns a tuple of the op's problem or None; returns None if the op was not checked."""
        value = self.cache(key[1]).get(SECTION, _cache_key(key))
        if not isinstance(value, dict) or not isinstance(value.get("problem", 0), str | None):
            return None
        return (value["problem"],)

    def _trusted_of(self, key: _Key) -> set[str]:
        """Returns the correct binaries of an op, found by this or an earlier process."""
        if key not in self._trusted:
            start = f"{_cache_key(key)}/"
            known = self.cache(key[1]).items(BINARIES)
            self._trusted[key] = {
                name.removeprefix(start)
                for name, is_right in known.items()
                if name.startswith(start) and is_right is True
            }
        return self._trusted[key]

    def _lock_of(self, key: _Key) -> threading.Lock:
        return self._locks.setdefault(key, threading.Lock())

    def _check(self, key: _Key, find_problem: Callable[[], str | None]) -> None:
        """Finds the problem of an op, if any, and remembers it."""
        device = key[1]
        cache = self.cache(device)
        try:
            problem = self._outside(device, lambda: self._trusting(key, find_problem))
        except _CallersMemory:
            return
        except Exception as error:
            # only in this process: a check at every call costs too much; the next may have room
            self._problems[key] = f"not checked: {reason_of(error)}"
        else:
            self._problems[key] = problem
            cache.put(SECTION, _cache_key(key), {"problem": problem})
            self._log_notes(cache)
        self._report(key)

    def _trusting(self, key: _Key, find_problem: Callable[[], str | None]) -> str | None:
        """Trusts the binaries that run in a check that finds no problem."""
        with noting() as launched:
            problem = find_problem()
        if problem is None:
            for digest in launched.digests - self._trusted_of(key):
                self._trusted[key].add(digest)
                self.cache(key[1]).put(BINARIES, f"{_cache_key(key)}/{digest}", True)
        return problem

    def _small_problem(self, key: _Key) -> str | None:
        """Returns the first problem of the small cases of an op, or None."""
        op, device, dtype, _ = key
        for case in small_cases():
            if case.op == op:
                problem = case_problem(
                    case,
                    dtype,
                    device,
                    impl="triton",
                    run_case=self._run_case,
                    hardware=self._hardware,
                )
                if problem is not None:
                    return f"{op}, {case}, {DTYPE_NAMES[dtype]}: {problem}"
        return None

    def _few_problem(
        self,
        key: _Key,
        launch: Launch,
        args: Sequence[Any],
        launched: Launched,
        error: Exception | None,
    ) -> str | None:
        """Returns the problem of the binaries of a launch, run on few images, or None.

        Raises:
            NotChecked: the check could not run.
            _CallersMemory: there is not enough memory for the launch (`error`), nor for the check.
        """
        op, device, dtype, _ = key
        lost = why_lost(device, self._hardware)
        if lost is not None:
            if launched.digests <= self._trusted_of(key):  # an earlier kernel, perhaps not ours
                raise NotChecked(lost)
            self._lost[device] = lost
            return f"{op}, {DTYPE_NAMES[dtype]}: {lost}"
        for n_images in (FEW_IMAGES, None):
            with forced(launched.configs), noting() as again:
                few = launch.alike(args, n_images, SEED)
                try:
                    problem = launch_problem(launch, few, device, self._hardware)
                except NotChecked:
                    if error is not None and is_out_of_memory(error):
                        raise _CallersMemory from error
                    raise
            if problem is not None:
                shape = "x".join(map(str, few[0].shape))
                configs = "".join(f", {config}" for config in launched.configs.values())
                return f"{op}, {shape}, {DTYPE_NAMES[dtype]}{configs}: {problem}"
            if launched.digests <= again.digests:
                return None
        raise NotChecked("other kernels are launched for other values of the same sizes")

    def _library_is_right(self, launch: Launch, args: Sequence[Any]) -> bool:
        device, dtype = args[0].device, launch.dtype(args)

        def find_problem() -> str | None:
            several = launch.alike(args, None, SEED)
            last = len(several[0]) - 1
            return launch_problem(
                launch,
                launch.ends(several),
                device,
                self._hardware,
                run=lambda: launch.run(*several)[[0, last]],
            )

        try:
            problem = self._outside(device, find_problem) if len(args[0]) else None
        except Exception as error:
            problem = f"not checked: {reason_of(error)}"
        if problem is not None:
            shape = "x".join(map(str, args[0].shape))
            with self._lock:
                self._unsaid.append(
                    f"{launch.op} is off on {self.cache(device).machine.device} for {shape} in "
                    f"{DTYPE_NAMES[dtype]}, and our own kernel runs instead: {problem}"
                )
        return problem is None

    def _outside(self, device: torch.device, function: Callable[[], _Result]) -> _Result:
        """Calls a function in a new thread, on the caller's stream but without the caller's modes.

        The modes are autocast, inference mode and fake tensors; a check may begin anywhere, also
        while a model is traced.
        """
        if device in self._lost:
            raise NotChecked(self._lost[device])
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def call() -> _Result:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                try:
                    return function()
                finally:
                    lost = why_lost(device, self._hardware)
                    if lost is not None:
                        self._lost[device] = lost

        with ThreadPoolExecutor(1, "fastbb-self-check") as pool:
            return pool.submit(call).result()

    def _report(self, key: _Key, remembered: bool = False) -> None:
        problem = self._problems[key]
        if problem is None:
            return
        op, device, dtype, _ = key
        cache = self.cache(device)
        instead = "the ops that it is made of run" if find_op(op).is_block else "eager PyTorch runs"
        text = (
            f"fastbb's kernel of {op} is off on {cache.machine.device} for {DTYPE_NAMES[dtype]}, "
            f"and {instead} instead: {problem}"
        )
        if remembered:
            text += f" (remembered in {cache.path}; `fastbb check --again` tries it again)"
        with self._lock:
            self._unsaid.append(text)

    def _warn(self) -> None:
        with self._lock:
            texts, self._unsaid = self._unsaid, []
        for text in texts:
            warn_caller(text, KernelWarning)

    def _log_notes(self, cache: ResultCache) -> None:
        for note in cache.notes:
            if note not in self._logged:
                self._logged.add(note)
                _log.info(note)


def _key(op: str, device: torch.device, dtype: torch.dtype) -> _Key:
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return op, device, dtype, input_precision(dtype)


def _cache_key(key: _Key) -> str:
    op, _, dtype, precision = key
    return f"{op}/{dtype}" + ("/tf32" if precision == "tf32" else "")
