"""Whether the ops compute on a device what they ought to: tried at first use, and remembered.

A GPU that nobody tried may miscompile a kernel, or lack the resources that it takes. So each
compiled kernel is tried when it is launched for the first time: the same binary, on few images,
against PyTorch's own ops in float64. An op of which one fails runs as those from then on.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._dispatch import TRITON_DTYPES, Impl, KernelWarning, input_precision
from ._dispatch import current_check as current
from ._dispatch import use_check as use
from .accuracy import FP32_REL, accuracy_problem, max_error, max_magnitude
from .case import Case
from .cases import small_cases
from .launching import Launch, Launched, forced, noting, unchecked
from .machine import Machine
from .op import DTYPE_NAMES, find_op, in_float64, op_names
from .result_cache import ResultCache

__all__ = ["Hardware", "NotChecked", "SelfCheck", "case_problem", "current", "use"]

SECTION = "self_check"
BINARIES = "binaries"  # section of the digests that were found to be right
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
        if device.type != "cuda":
            return False
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()


def run_case(case: Case, arguments: dict[str, Any], impl: Impl) -> Tensor:
    """Calls the op of a case."""
    return find_op(case.op).call(**arguments, impl=impl)


class SelfCheck:
    """Tries the kernels of ops on devices, and remembers what came of it.

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
        # what decides; None: nothing has failed
        self._problems: dict[_Key, str | None] = {}
        self._not_checked: set[_Key] = set()  # in this process; another may find out
        self._trusted: dict[_Key, set[str]] = {}
        self._caches: dict[torch.device, ResultCache] = {}
        self._lost: dict[torch.device, str] = {}
        self._lock = threading.RLock()
        self._locks: dict[_Key, threading.Lock] = {}
        self._unsaid: list[str] = []
        self._logged: set[str] = set()
        self._worker = threading.local()

    def problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why an op's kernels are off on a device, or None; runs nothing.

        It warns of what an earlier process found.

        Args:
            op: its name.
            device: where it is to run.
            dtype: of its tensors.
        """
        try:  # what an op costs more on a GPU; a tensor's device needs no `_key`
            return self._problems[op, device, dtype, input_precision(dtype)]
        except KeyError:
            key = _key(op, device, dtype)
        if device.type == "meta" or key in self._being_checked():
            return None
        with self._lock_of(key):
            if key not in self._problems:
                found = self._remembered(key)
                self._problems[key] = found[0] if found else None
                self._report(key, remembered=True)
        self._warn()
        return self._problems[key]

    def known_problem(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """As `problem`, without a warning, and not because something could not be checked."""
        key = _key(op, device, dtype)
        if device.type == "meta" or key in self._not_checked:
            return None
        found = (self._problems[key],) if key in self._problems else self._remembered(key)
        return found[0] if found else None

    def launch(self, launch: Launch, args: Sequence[Any]) -> Tensor:
        """Runs a launch if its binaries are right, else what the op has instead.

        A binary is tried when it comes for the first time; who else launches it waits. While a CUDA
        graph is being captured nothing is tried, and what was not tried before does not run.

        Args:
            launch: of an op.
            args: its arguments; the first one is a tensor on the device.

        Raises:
            Exception: whatever the launch raises although its binaries are right.
        """
        dtype = launch.dtype(args)
        key = launch.op, args[0].device, dtype, input_precision(dtype)
        # asked only where it may not be None: this is what every launch costs more
        if self._problems.get(key, "") is not None and self.problem(*key[:3]) is not None:
            return launch.instead(*args)
        if key in self._being_checked():
            return launch.run(*args)
        trusted = self._trusted.get(key) or self._trusted_of(key)
        if not trusted and self._hardware.is_capturing(key[1]):
            return launch.instead(*args)
        y = error = None
        with noting() as launched:
            try:
                y = launch.run(*args)
            except Exception as raised:
                error = raised
        if y is not None and launched.digests <= trusted:
            return y
        if self._hardware.is_capturing(key[1]):
            return launch.instead(*args)
        with self._lock_of(key):
            # another thread may have tried it
            if self._problems[key] is None and not (y is not None and launched.digests <= trusted):
                self._check(key, lambda: self._few_problem(key, launch, args, launched))
        self._warn()
        if self._problems.get(key) is not None:
            return launch.instead(*args)
        if error is not None:
            raise error
        assert y is not None
        return y

    def check(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Runs the small cases of an op, whatever was found before.

        Returns:
            what is wrong, in a sentence, or None.
        """
        key = _key(op, device, dtype)
        with self._lock_of(key):
            self._problems.pop(key, None)  # or the cases would not run its kernels
            self._check(key, lambda: self._small_problem(key))
        self._warn()
        return self._problems[key]

    def results(self, device: torch.device) -> dict[tuple[str, torch.dtype], str | None]:
        """The problem, or None, of each op and dtype that was checked; runs nothing."""
        pairs = [(op, dtype) for op in op_names() for dtype in TRITON_DTYPES]
        found = {(op, dtype): self._remembered(_key(op, device, dtype)) for op, dtype in pairs}
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

    def _remembered(self, key: _Key) -> tuple[str | None] | None:
        """The problem of an op that was checked before, or None in it; None: it was not."""
        value = self.cache(key[1]).get(SECTION, _cache_key(key))
        if not isinstance(value, dict) or not isinstance(value.get("problem", 0), str | None):
            return None
        return (value["problem"],)

    def _trusted_of(self, key: _Key) -> set[str]:
        """The binaries of an op that were found to be right, here or in an earlier process."""
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
        """Finds what is wrong with an op, and remembers it."""
        cache = self.cache(key[1])
        self._not_checked.discard(key)
        try:
            problem = self._outside(lambda: self._checking(key, find_problem))
        except Exception as error:
            # for this process: every call would try it again, and the next one may have room
            reason = str(error) if isinstance(error, NotChecked) else _name(error)
            self._not_checked.add(key)
            self._problems[key] = f"not checked: {reason}"
        else:
            self._problems[key] = problem
            cache.put(SECTION, _cache_key(key), {"problem": problem})
            self._log_notes(cache)
        self._report(key)

    def _checking(self, key: _Key, find_problem: Callable[[], str | None]) -> str | None:
        """Calls in the thread of a check; trusts the binaries that ran if all is well."""
        device = key[1]
        if device in self._lost:
            raise NotChecked(self._lost[device])
        being_checked = self._being_checked()
        being_checked.append(key)
        try:
            with noting() as launched:
                problem = find_problem()
        finally:
            being_checked.pop()
            lost = _loss(device, self._hardware)
            if lost is not None:
                self._lost[device] = lost
        if problem is None:
            for digest in launched.digests - self._trusted_of(key):
                self._trusted[key].add(digest)
                self.cache(device).put(BINARIES, f"{_cache_key(key)}/{digest}", True)
        return problem

    def _small_problem(self, key: _Key) -> str | None:
        """What is wrong in the small cases of an op."""
        op, device, dtype, _ = key
        for case in small_cases():
            if case.op == op:
                problem = case_problem(
                    case, dtype, device, run_case=self._run_case, hardware=self._hardware
                )
                if problem is not None:
                    return f"{op}, {case}, {DTYPE_NAMES[dtype]}: {problem}"
        return None

    def _few_problem(
        self, key: _Key, launch: Launch, args: Sequence[Any], launched: Launched
    ) -> str | None:
        """What is wrong with the binaries of a launch, on few images."""
        op, device, dtype, _ = key
        lost = _loss(device, self._hardware)  # by the launch
        if lost is not None:
            self._lost[device] = lost
            return f"{op}, {DTYPE_NAMES[dtype]}: {lost}"
        for n_images in (launch.few_images, None):
            with forced(launched.configs), noting() as again:
                few = launch.alike(args, n_images, _SEED)
                problem = _launch_problem(launch, few, device, self._hardware)
            if problem is not None:
                shape = "x".join(map(str, few[0].shape))
                configs = "".join(f", {config}" for config in launched.configs.values())
                return f"{op}, {shape}, {DTYPE_NAMES[dtype]}{configs}: {problem}"
            if launched.digests <= again.digests:
                break
        return None

    def _being_checked(self) -> list[_Key]:
        """What this thread is checking: an op, and the op whose case called it."""
        try:
            return self._worker.keys
        except AttributeError:
            self._worker.keys = []
            return self._worker.keys

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
        problem = self._problems[key]
        if problem is None:
            return
        op, device, dtype, _ = key
        cache = self.cache(device)
        text = (
            f"fastbb's kernel of {op} is off on {cache.machine.device} for {DTYPE_NAMES[dtype]}, "
            f"and {_instead(op)} instead: {problem}"
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
        impl: "auto" runs what a model would run, "triton" the kernel whatever is known of it.
        run_case: calls the op.
        hardware: what is asked of the device.

    Returns:
        what is wrong, in a sentence; None if all is well or the op's kernels do not take the case.

    Raises:
        NotChecked: PyTorch's own ops fail, or the device has no memory left.
    """
    hardware = hardware or Hardware()
    op = find_op(case.op)

    def run() -> Tensor:
        with unchecked() if impl == "triton" else nullcontext():
            return run_case(case, arguments, impl)

    with _on(device):
        try:
            arguments = case.arguments(device, dtype, _SEED)
            if op.unsupported(**arguments):
                return None
        except Exception as error:
            raise NotChecked(f"PyTorch's own ops fail on {device}: {_name(error)}") from error
        return _problem_of(
            run=run,
            eager=lambda: op.eager(**arguments),
            exact=lambda: op.eager(**in_float64(arguments)),
            device=device,
            hardware=hardware,
        )


@torch.no_grad()
def _launch_problem(
    launch: Launch, args: Sequence[Any], device: torch.device, hardware: Hardware
) -> str | None:
    """As `case_problem`, for a launch with given arguments."""
    wide = [x.double() if isinstance(x, Tensor) else x for x in args]
    with _on(device):
        return _problem_of(
            run=lambda: launch.run(*args),
            eager=lambda: launch.eager(*args),
            exact=lambda: launch.eager(*wide),
            device=device,
            hardware=hardware,
        )


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _problem_of(
    *,
    run: Callable[[], Tensor],
    eager: Callable[[], Tensor],
    exact: Callable[[], Tensor],
    device: torch.device,
    hardware: Hardware,
) -> str | None:
    """What is wrong with the results of `run`, called twice; see `case_problem`."""
    try:
        eager_result, exact_result = eager(), exact()
        hardware.synchronize(device)
    except Exception as error:
        raise NotChecked(f"PyTorch's own ops fail on {device}: {_name(error)}") from error
    results: list[Tensor] = []
    for _ in range(_N_RUNS):
        try:
            _fill_free_memory(eager_result)
            results.append(run())
            hardware.synchronize(device)
            problem = _difference(results[-1], eager_result, exact_result)
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
        return f"asks for more memory than so few images may take: {problem}"
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


def _instead(op: str) -> str:
    """What runs where an op is off."""
    if op not in op_names():  # a library's, in the place of a kernel
        return "our own kernel runs"
    return "the ops that it is made of run" if find_op(op).is_block else "eager PyTorch runs"


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
