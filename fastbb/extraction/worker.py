"""What a worker does: it loads the model of a run, and computes the shards that it is given.

It is asked by JSON and answers by JSON, so that a process (`local_workers`) and an actor of Ray
(`ray_workers`) serve alike. A request has several answers, of which the last one is named here:

    {"do": "start", ...}          the arguments of `Start`; "environment"
    {"do": "plan", ...}           the arguments of `Executor.make_plan`; "plan"
    {"do": "shard", "shard": 3}   "rows" and "errors" of each batch; "committed"

An error is the last answer to any request: "error", its "kinds" and "exit_code". A "warning" is one
on its way.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from ..images.processor import ImageProcessor
from ..images.spec import ImageProcessorSpec
from .executor import InProcess
from .layout import ExtractionError, PlanMismatchError, is_started, read_plan
from .loading import check_processor
from .pipeline import n_decode_threads
from .plan import make_extractor
from .shards import Committed, Computed
from .store import FeatureWriter

Message = dict[str, Any]
# NFS may show a file that another machine has written so much later
_PATIENCE_S = 90.0


@dataclass(frozen=True)
class Start:
    """How a worker begins.

    Attributes:
        directory: the features directory, absolute.
        model: name or directory; None: that of the plan.
        said: arguments of `FeatureExtractor` that the command said, in JSON types.
        batch_size: as the command said.
        device: of this worker; None: as said, or the plan's.
        threads: of torch, for a first start; None: torch's own choice. A plan's go before.
        n_sharers: workers of this machine, which share its cores for decoding.
    """

    directory: str
    model: str | None
    said: Message
    batch_size: int | None
    device: str | None = None
    threads: int | None = None
    n_sharers: int = 1


def said_in_json(said: Mapping[str, Any]) -> Message:
    """Returns arguments of `FeatureExtractor` in JSON types, without those that are None."""
    found = {name: value for name, value in said.items() if value is not None}
    if "processor" in found:
        check_processor(found["processor"])
        found["processor"] = found["processor"].spec.to_dict()
    if "out_indices" in found:
        found["out_indices"] = list(found["out_indices"])
    if "device" in found:
        found["device"] = str(found["device"])
    return found


class WorkerServer:
    """Answers the requests of a pool, one after the other."""

    def __init__(self) -> None:
        self._executor: InProcess | None = None
        self._writer: FeatureWriter | None = None

    def answer(self, request: Message) -> Iterator[Message]:
        """Does what is asked for, and yields the answers."""
        heard: list[str] = []
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: heard.append(str(message))
                for answer in self._answers(request):
                    while heard:
                        yield {"warning": heard.pop(0)}
                    yield answer
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            code = getattr(error, "exit_code", None)
            yield {"error": _text(error), "kinds": kinds, "exit_code": code}

    def _answers(self, request: Message) -> Iterator[Message]:
        if request["do"] == "start":
            yield {"environment": self._start(Start(**request["start"]))}
            return
        assert self._executor is not None and self._writer is not None, "it was not started"
        if request["do"] == "plan":
            yield {"plan": self._executor.make_plan(**request["arguments"])}
            return
        writer, number = self._writer, request["shard"]
        deadline = time.monotonic() + _PATIENCE_S
        while number >= writer.n_shards:  # of a generation that this worker does not know
            writer.read()
            if number < writer.n_shards or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        if number >= writer.n_shards:
            raise PlanMismatchError(
                f"{writer.directory} on {platform.node()} has no shard {number}: workers write "
                "into a directory that is the same on every machine"
            )
        for event in self._executor.compute(writer, [writer.shards[number]]):
            if isinstance(event, Computed):
                yield {"rows": event.rows, "errors": [asdict(error) for error in event.errors]}
            elif isinstance(event, Committed):
                yield {"committed": event.shard, "commit": event.commit}

    def _start(self, start: Start) -> Message:
        directory = Path(start.directory)
        plan = read_plan(directory / "plan.json") if is_started(directory) else None
        threads = start.threads if plan is None else plan.get("threads", start.threads)
        if threads is not None:
            torch.set_num_threads(threads)
        said = dict(start.said)
        if "processor" in said:
            said["processor"] = ImageProcessor(ImageProcessorSpec.from_dict(said["processor"]))
        if start.device is not None:
            said["device"] = start.device
        extractor = make_extractor(start.model, directory, plan, said, start.batch_size)
        n_threads = n_decode_threads(extractor.device) // start.n_sharers
        extractor.decode_threads = max(1, n_threads)
        self._executor = InProcess(extractor)
        self._writer = FeatureWriter(directory)
        if plan is not None:
            self._writer.read()
            self._executor.check_plan(self._writer)
        return self._executor.environment


def _text(error: Exception) -> str:
    """Returns the message of an error that a user can do something about, else where it came."""
    if isinstance(error, (ExtractionError, ValueError, OSError, TypeError, ImportError)):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def main() -> None:
    """Serves a pool by lines of JSON: requests from standard input, answers to standard output.

    What libraries print goes to stderr. The process ends as soon as its input does, in the middle
    of a shard as well: the pool has ended.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            requests.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    server = WorkerServer()
    while True:
        for answer in server.answer(json.loads(requests.get())):
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()
