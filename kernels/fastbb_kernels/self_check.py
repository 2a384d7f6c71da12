"""Whether the ops compute on a device what they ought to: tried at first use, and remembered.

A GPU that nobody tried may miscompile a kernel, or lack the resources that it takes. So each
compiled kernel is tried when it is launched for the first time: the same binary, on few images,
against PyTorch's own ops in float64. An op of which one fails runs as those from then on.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._dispatch import TRITON_DTYPES, Impl, KernelWarning, input_precision, unchecked
from ._dispatch import current_check as current
from ._dispatch import use_check as use
from .accuracy import FP32_REL, accuracy_problem, max_error, max_magnitude
from .case import Case
from .cases import small_cases
from .launching import FEW_IMAGES, Launch, Launched, forced, noting
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
_LIBRARY_CALLS = 4096  # that are told apart
_MAX_ERROR_CHARACTERS = 300

_log = logging.getLogger(__name__)

_Key = tuple[str, torch.device, torch.dtype, str]
_Result = TypeVar("_Result")


class NotChecked(RuntimeError):
    """A case could not be run through, and its op is not to blame; the message says why."""


class _CallersMemory(Exception):
    """There was no memory for a launch, nor for its check: nothing was found out."""


class Hardware:
    """What a check asks of a device, besides running ops."""

    def synchronize(self, device: torch.device) -> None:
        """Waits for the current stream; raises what a kernel left behind.

        Not for the whole device: CUDA forbids that while another thread captures a graph.
        """
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def has_room(self, device: torch.device, n_bytes: int) -> bool:
        """Whether so much memory is there."""
        try:
            torch.empty(n_bytes, dtype=torch.uint8, device=device)
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
        """As `problem`, without a warning."""
        key = _key(op, device, dtype)
        if device.type == "meta":
            return None
        found = (self._problems[key],) if key in self._problems else self._remembered(key)
        return found[0] if found else None

    def launch(self, launch: Launch, args: Sequence[Any]) -> Tensor:
        """Runs a launch if its binaries are right, else PyTorch's own ops.

        A binary is tried when it comes for the first time, right after it ran, and its result is
        handed on only if it is right; who else launches it waits. While a CUDA graph is being
        captured nothing is tried, and the result of what was not tried before is not handed on.

        Args:
            launch: of an op.
            args: its arguments; the first one is a tensor on the device.

        Raises:
            Exception: whatever the launch raises although its binaries are right, and its being out
                of memory.
        """
        dtype = launch.dtype(args)
        key = launch.op, args[0].device, dtype, input_precision(dtype)
        # asked only where it may not be None: this is what every launch costs more
        if self._problems.get(key, "") is not None and self.problem(*key[:3]) is not None:
            return launch.eager(*args)
        trusted = self._trusted.get(key) or self._trusted_of(key)
        if not trusted:
            if self._hardware.is_capturing(key[1]):
                return launch.eager(*args)
            self._hardware.synchronize(key[1])  # raises what is not of our making
        y = error = None
        with noting() as launched:
            try:
                y = launch.run(*args)
            except Exception as raised:
                error = raised
        if error is None and launched.digests <= trusted:
            return y  # pyright: ignore[reportReturnType] - what is no tensor is found by the check
        if self._hardware.is_capturing(key[1]):
            return launch.eager(*args)
        with self._lock_of(key):
            # another thread may have tried it
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
        """Whether a library's call is right; it is tried the first time, in each process.

        Libraries choose what runs by all sizes, so it is tried with all images, of which the first
        and the last are compared.

        Args:
            call: what the library chooses by.
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
        """Runs the small cases of an op by its kernels, whatever was found before.

        Returns:
            what is wrong, in a sentence, or None.
        """
        key = _key(op, device, dtype)
        with self._lock_of(key):
            self._check(key, lambda: self._small_problem(key))
        self._warn()
        return self._problems.get(key)

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
        device = key[1]
        cache = self.cache(device)
        try:
            problem = self._outside(device, lambda: self._trusting(key, find_problem))
        except _CallersMemory:
            return
        except Exception as error:
            # for this process: every call would try it again, and the next one may have room
            self._problems[key] = f"not checked: {_reason(error)}"
        else:
            self._problems[key] = problem
            cache.put(SECTION, _cache_key(key), {"problem": problem})
            self._log_notes(cache)
        self._report(key)

    def _trusting(self, key: _Key, find_problem: Callable[[], str | None]) -> str | None:
        """Trusts the binaries that run in a check if all is well."""
        with noting() as launched:
            problem = find_problem()
        if problem is None:
            for digest in launched.digests - self._trusted_of(key):
                self._trusted[key].add(digest)
                self.cache(key[1]).put(BINARIES, f"{_cache_key(key)}/{digest}", True)
        return problem

    def _small_problem(self, key: _Key) -> str | None:
        """What is wrong in the small cases of an op."""
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
        """What is wrong with the binaries of a launch, on few images.

        Raises:
            NotChecked: that cannot be said.
            _CallersMemory: as `error` says, there was none for the launch, nor is there for this.
        """
        op, device, dtype, _ = key
        lost = _loss(device, self._hardware)
        if lost is not None:
            if launched.digests <= self._trusted_of(key):  # a kernel before it, perhaps not ours
                raise NotChecked(lost)
            self._lost[device] = lost
            return f"{op}, {DTYPE_NAMES[dtype]}: {lost}"
        for n_images in (FEW_IMAGES, None):
            with forced(launched.configs), noting() as again:
                few = launch.alike(args, n_images, _SEED)
                try:
                    problem = _launch_problem(launch, few, device, self._hardware)
                except NotChecked:
                    if error is not None and _is_out_of_memory(error):
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
            several = launch.alike(args, None, _SEED)
            last = len(several[0]) - 1
            return _launch_problem(
                launch,
                launch.ends(several),
                device,
                self._hardware,
                run=lambda: launch.run(*several)[[0, last]],
            )

        try:
            problem = self._outside(device, find_problem) if len(args[0]) else None
        except Exception as error:
            problem = f"not checked: {_reason(error)}"
        if problem is not None:
            shape = "x".join(map(str, args[0].shape))
            with self._lock:
                self._unsaid.append(
                    f"{launch.op} is off on {self.cache(device).machine.device} for {shape} in "
                    f"{DTYPE_NAMES[dtype]}, and our own kernel runs instead: {problem}"
                )
        return problem is None

    def _outside(self, device: torch.device, function: Callable[[], _Result]) -> _Result:
        """Calls in a thread of its own, on the caller's stream but with none of its modes.

        Those are autocast, inference mode and fake tensors; a check may begin anywhere, also while
        a model is traced.
        """
        if device in self._lost:
            raise NotChecked(self._lost[device])
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def call() -> _Result:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                try:
                    return function()
                finally:
                    lost = _loss(device, self._hardware)
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
            warnings.warn(text, KernelWarning, stacklevel=4)

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

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
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
    launch: Launch,
    args: Sequence[Any],
    device: torch.device,
    hardware: Hardware,
    run: Callable[[], Tensor] | None = None,
) -> str | None:
    """As `case_problem`, for a launch with given arguments, or what `run` makes of those."""
    wide = [x.double() if isinstance(x, Tensor) else x for x in args]
    return _problem_of(
        run=run or (lambda: launch.run(*args)),
        eager=lambda: launch.eager(*args),
        exact=lambda: launch.eager(*wide),
        device=device,
        hardware=hardware,
    )


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
        _fill_free_memory(eager_result)
        try:
            results.append(run())
            hardware.synchronize(device)
        except Exception as error:  # whatever a launch raises: the op is off, with this reason
            return _failure(error, device, hardware, 4 * eager_result.nbytes)
        problem = _difference(results[-1], eager_result, exact_result)
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


def _failure(error: Exception, device: torch.device, hardware: Hardware, n_bytes: int) -> str:
    """What a launch's exception means.

    Args:
        error: the exception.
        device: of the launch.
        hardware: what is asked of the device.
        n_bytes: that a launch may take, besides what small ones need.

    Raises:
        NotChecked: the device has no memory left.
    """
    problem = _name(error)
    lost = _loss(device, hardware)
    if lost is not None:
        return f"{problem}; {lost}"
    if _is_out_of_memory(error):
        if not hardware.has_room(device, n_bytes + _ROOM_BYTES):
            raise NotChecked(f"{device} has no memory left: {problem}") from error
        return f"asks for more memory than such a call may take: {problem}"
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


def _is_out_of_memory(error: Exception) -> bool:
    # a driver says it in a RuntimeError
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in _name(error).lower()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, NotChecked) else _name(error)


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
