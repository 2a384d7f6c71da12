"""Whether the ops compute on a device what they ought to: tried at first use, and remembered.

A GPU that nobody tried may miscompile a kernel, or lack the resources that it takes. An op runs as
PyTorch's own ops where one of its small cases fails.
"""

import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._dispatch import TRITON_DTYPES, Impl, KernelWarning, input_precision
from ._dispatch import current_check as current
from ._dispatch import use_check as use
from .accuracy import FP32_REL, accuracy_problem, max_error, max_magnitude
from .case import Case
from .cases import small_cases
from .machine import Machine
from .op import DTYPE_NAMES, find_op, in_float64, op_names
from .result_cache import ResultCache

__all__ = ["Hardware", "NotChecked", "SelfCheck", "case_problem", "current", "use"]

SECTION = "self_check"
_SEED = 0
_N_RUNS = 2
# more than a small case needs, in float64 as well
_ROOM_BYTES = 128 * 2**20
_MAX_ERROR_CHARACTERS = 300

_log = logging.getLogger(__name__)

_Key = tuple[str, torch.device, torch.dtype, str]
_Result = TypeVar("_Result")


class NotChecked(RuntimeError):
    """A case could not be run through, and its op is not to blame; the message says why."""


class Hardware:
    """What a check asks of a device, besides running ops."""

    def synchronize(self, device: torch.device) -> None:
        """Waits for the device; raises what a kernel left behind."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def has_room(self, device: torch.device) -> bool:
        """Whether the memory that the small cases need is there."""
        try:
            torch.empty(_ROOM_BYTES, dtype=torch.uint8, device=device)
        except RuntimeError:  # of PyTorch or of the driver
            return False
        return True

    def is_capturing(self, device: torch.device) -> bool:
        """Whether a CUDA graph is being recorded, so that nothing may wait for the device."""
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def run_case(case: Case, arguments: dict[str, Any], impl: Impl) -> Tensor:
    """Calls the op of a case."""
    return find_op(case.op).call(**arguments, impl=impl)


class SelfCheck:
    """Runs the small cases of ops on devices, and remembers what came of it.

    Safe to use from several threads, which wait for a check that another one has begun.
    """

    def __init__(
        self,
        *,
        run_case: Callable[[Case, dict[str, Any], Impl], Tensor] = run_case,
        machine_of: Callable[[torch.device], Machine] = Machine.of,
        cache_of: Callable[[Machine], ResultCache] = ResultCache,
        hardware: Hardware | None = None,
    ) -> None:
        """Makes a check that knows nothing yet; the arguments are for tests.

        Args:
            run_case: calls the op of a case.
            machine_of: describes the machine of a device.
            cache_of: opens the results of a machine.
            hardware: what is asked of devices.
        """
        self._run_case = run_case
        self._machine_of = machine_of
        self._cache_of = cache_of
        self._hardware = hardware or Hardware()
        self._problems: dict[_Key, str | None] = {}
        self._not_checked: dict[_Key, str] = {}
        self._caches: dict[torch.device, ResultCache] = {}
        self._lost: dict[torch.device, str] = {}
        self._lock = threading.RLock()
        self._locks: dict[_Key, threading.Lock] = {}
        self._unsaid: list[str] = []
        self._logged: set[str] = set()
        self._worker = threading.local()

    def problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why an op's kernels cannot be trusted on a device; checks them at first use.

        The first time that it finds a problem it warns. While a CUDA graph is being captured it
        does not check, and an op that nobody checked before has that as its problem.

        Args:
            op: its name.
            device: where it is to run.
            dtype: of its tensors.

        Returns:
            a sentence, or None: all is well.
        """
        try:  # what an op costs more on a GPU; a tensor's device needs no `_key`
            return self._problems[op, device, dtype, input_precision(dtype)]
        except KeyError:
            key = _key(op, device, dtype)
        if device.type == "meta" or key in self._being_checked():
            return None
        with self._locks.setdefault(key, threading.Lock()):
            found = self._find(key)
            if found and key not in self._problems:
                (self._problems[key],) = found
                self._report(key, remembered=True)
            elif not found and key not in self._not_checked:
                if self._hardware.is_capturing(key[1]):
                    return "not checked yet, and a CUDA graph is being captured: run it once before"
                self._check(key)
        self._warn()
        return self._outcome(key)

    def known_problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """As `problem`, but only what was found before, in this process or an earlier one."""
        found = None if device.type == "meta" else self._find(_key(op, device, dtype))
        return found[0] if found else None

    def check_again(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """As `problem`, whatever was found before."""
        key = _key(op, device, dtype)
        with self._locks.setdefault(key, threading.Lock()):
            self._problems.pop(key, None)
            self._check(key)
        self._warn()
        return self._outcome(key)

    def results(self, device: torch.device) -> dict[tuple[str, torch.dtype], str | None]:
        """The problem, or None, of each op and dtype that was checked; runs nothing."""
        pairs = [(op, dtype) for op in op_names() for dtype in TRITON_DTYPES]
        found = {(op, dtype): self._find(_key(op, device, dtype)) for op, dtype in pairs}
        return {pair: outcome[0] for pair, outcome in found.items() if outcome}

    def cache(self, device: torch.device) -> ResultCache:
        """Where the results of a device are kept."""
        with self._lock:
            if device not in self._caches:
                machine = self._machine_of(device)
                same = (cache for cache in self._caches.values() if cache.machine == machine)
                self._caches[device] = next(same, None) or self._cache_of(machine)
                self._log_notes(self._caches[device])
            return self._caches[device]

    def _find(self, key: _Key) -> tuple[str | None] | None:
        """The problem of an op that was checked before; None: it was not."""
        if key in self._problems:
            return (self._problems[key],)
        value = self.cache(key[1]).get(SECTION, _cache_key(key))
        if not isinstance(value, dict) or not isinstance(value.get("problem", 0), str | None):
            return None
        return (value["problem"],)

    def _outcome(self, key: _Key) -> str | None:
        return self._problems[key] if key in self._problems else self._not_checked[key]

    def _check(self, key: _Key) -> None:
        """Runs the small cases of an op and remembers what came of it."""
        device = key[1]
        cache = self.cache(device)
        try:
            problem = self._outside(lambda: self._small_cases(key))
        except Exception as error:
            # for this process: every call would try it again, and the next one may have room
            reason = str(error) if isinstance(error, NotChecked) else _name(error)
            self._not_checked[key] = f"not checked: {reason}"
        else:
            self._problems[key] = problem
            cache.put(SECTION, _cache_key(key), {"problem": problem})
            self._log_notes(cache)
        self._report(key)

    def _small_cases(self, key: _Key) -> str | None:
        op, device, dtype, _ = key
        if device in self._lost:
            raise NotChecked(self._lost[device])
        being_checked = self._being_checked()
        being_checked.append(key)
        try:
            for case in small_cases():
                if case.op == op:
                    problem = case_problem(
                        case, dtype, device, run_case=self._run_case, hardware=self._hardware
                    )
                    if problem is not None:
                        return f"{op}, {case}, {DTYPE_NAMES[dtype]}: {problem}"
            return None
        finally:
            being_checked.pop()
            lost = _loss(device, self._hardware)
            if lost is not None:
                self._lost[device] = lost

    def _being_checked(self) -> list[_Key]:
        """What this thread is checking: an op, and the op whose case called it."""
        return self._worker.__dict__.setdefault("keys", [])

    def _outside(self, function: Callable[[], _Result]) -> _Result:
        """Calls in a thread of its own, which has none of the caller's modes.

        Those are autocast, inference mode, fake tensors, streams and devices; a check may begin
        anywhere, also while a model is traced.
        """
        if self._being_checked():
            return function()
        with ThreadPoolExecutor(1, "fastbb-self-check") as pool:
            return pool.submit(function).result()

    def _report(self, key: _Key, remembered: bool = False) -> None:
        problem = self._outcome(key)
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
        """Says what is unsaid, but not in a case, where a warning may be an error."""
        if self._being_checked():
            return
        with self._lock:
            texts, self._unsaid = self._unsaid, []
        for text in texts:
            warnings.warn(text, KernelWarning, stacklevel=3)

    def _log_notes(self, cache: ResultCache) -> None:
        for note in cache.notes:
            if note not in self._logged:
                self._logged.add(note)
                _log.info(note)


@torch.no_grad()
def case_problem(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    impl: Impl = "auto",
    run_case: Callable[[Case, dict[str, Any], Impl], Tensor] = run_case,
    hardware: Hardware | None = None,
) -> str | None:
    """Runs a case on a device, twice, against the op's reference there.

    Args:
        case: of one op.
        dtype: of its tensors.
        device: where it runs.
        impl: "auto" runs what a model would run, "triton" insists on the kernel.
        run_case: calls the op.
        hardware: what is asked of the device.

    Returns:
        what is wrong, in a sentence; None if all is well or the op's kernels do not take the case.

    Raises:
        NotChecked: PyTorch's own ops fail, or the device has no memory left.
    """
    hardware = hardware or Hardware()
    op = find_op(case.op)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            arguments = case.arguments(device, dtype, _SEED)
            if op.unsupported(**arguments):
                return None
            eager = op.eager(**arguments)
            exact = op.eager(**in_float64(arguments))
            hardware.synchronize(device)
        except Exception as error:
            raise NotChecked(f"PyTorch's own ops fail on {device}: {_name(error)}") from error
        results: list[Tensor] = []
        for _ in range(_N_RUNS):
            try:
                _fill_free_memory(eager)
                results.append(run_case(case, arguments, impl))
                hardware.synchronize(device)
                problem = _difference(results[-1], eager, exact)
            except Exception as error:  # whatever a launch raises: the op is off, with this reason
                problem = _failure(error, device, hardware)
            if problem is not None:
                return problem
        if not torch.equal(results[0], results[1]):
            return f"two runs with the same inputs differ by {max_error(*results):.3g}"
    return None


def _difference(got: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    if not isinstance(got, Tensor):
        return f"wanted a tensor, got {type(got).__name__}"
    if got.isnan().any() and not eager.isnan().any():
        return "NaN where eager PyTorch has numbers"
    # PyTorch convolves in TF32 on NVIDIA GPUs unless it is told otherwise
    largest = max_magnitude(exact)
    lost = 2 * max_error(eager, exact) / largest if largest else 0.0
    return accuracy_problem(got, eager, exact, max(FP32_REL, lost))


def _failure(error: Exception, device: torch.device, hardware: Hardware) -> str:
    """What a launch's exception means.

    Raises:
        NotChecked: the device has no memory left.
    """
    problem = _name(error)
    lost = _loss(device, hardware)
    if lost is not None:
        return f"{problem}; {lost}"
    # a driver says it in a RuntimeError
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in problem.lower():
        if not hardware.has_room(device):
            raise NotChecked(f"{device} has no memory left: {problem}") from error
        return f"asks for more memory than a small case may take: {problem}"
    return problem


def _loss(device: torch.device, hardware: Hardware) -> str | None:
    """Why this process cannot use the device any more: CUDA repeats some errors for ever."""
    try:
        hardware.synchronize(device)
    except Exception as error:
        return f"{device} is lost to this process, which has to be restarted: {_name(error)}"
    return None


def _fill_free_memory(like: Tensor) -> None:
    """Leaves NaN in the memory that the next results are put in.

    PyTorch hands out what was freed last. It also can fill fresh memory itself, but only under
    `use_deterministic_algorithms`, where other kernels run.
    """
    blocks = [torch.full_like(like, torch.nan) for _ in range(4)]
    del blocks


def _name(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    cut = len(text) > _MAX_ERROR_CHARACTERS
    return f"{text[:_MAX_ERROR_CHARACTERS]}..." if cut else text


def _key(op: str, device: torch.device, dtype: torch.dtype) -> _Key:
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return op, device, dtype, input_precision(dtype)


def _cache_key(key: _Key) -> str:
    op, _, dtype, precision = key
    return f"{op}/{dtype}" + ("/tf32" if precision == "tf32" else "")
