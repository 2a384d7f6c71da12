"""Checks Triton kernels on a machine without a GPU. Needs the extra `testing`."""

from ..architectures import ARCHITECTURES, Architecture, find_architecture
from ..pretend_gpu import LaunchError, fake_gpu
from ..recorder import Launch, Recording, TensorArgument, record_launches
from .binary import BinaryFacts, binary_facts
from .budget import (
    Allowance,
    BinaryCost,
    Budget,
    CaseCost,
    read_budget,
    source_hash,
    violations,
    write_budget,
)
from .interpreter import interpret
from .trace_report import LaunchTrace, TensorTrace, Trace, Traffic
from .tracer import OutOfBounds, Race, corners, trace

__all__ = [
    "ARCHITECTURES",
    "Allowance",
    "Architecture",
    "BinaryCost",
    "BinaryFacts",
    "Budget",
    "CaseCost",
    "Launch",
    "LaunchError",
    "LaunchTrace",
    "OutOfBounds",
    "Race",
    "Recording",
    "TensorArgument",
    "TensorTrace",
    "Trace",
    "Traffic",
    "binary_facts",
    "corners",
    "fake_gpu",
    "find_architecture",
    "interpret",
    "read_budget",
    "record_launches",
    "source_hash",
    "trace",
    "violations",
    "write_budget",
]
