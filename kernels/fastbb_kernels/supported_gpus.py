"""The GPUs that kernels run on, and which of the launch tables each of them takes."""

# compute capability times ten on NVIDIA, the name of the instruction set on AMD
Architecture = int | str

# a GPU without tables takes those of one that has at most its shared memory
LAUNCH_TABLES: dict[Architecture, Architecture] = {
    80: 80,
    86: 86,
    87: 86,
    89: 89,
    90: 90,
    100: 100,
    101: 120,
    103: 100,
    110: 120,
    120: 120,
    121: 120,
    "gfx90a": "gfx90a",
    "gfx942": "gfx942",
}


def named(capability: str) -> Architecture:
    """Returns the architecture of a GPU with this capability: "9.0" or "gfx942"."""
    major, dot, minor = capability.partition(".")
    return 10 * int(major) + int(minor) if dot else capability


def gpu_problem(architecture: Architecture) -> str | None:
    """Returns why no kernel runs on such a GPU, or None."""
    if architecture in LAUNCH_TABLES:
        return None
    capabilities = ", ".join(_shown(name) for name in LAUNCH_TABLES if isinstance(name, int))
    others = " or ".join(name for name in LAUNCH_TABLES if isinstance(name, str))
    kind = "compute capability " if isinstance(architecture, int) else ""
    return (
        f"needs an NVIDIA GPU of compute capability {capabilities}, or AMD's {others}, "
        f"got {kind}{_shown(architecture)}, where impl='auto' runs PyTorch's own ops"
    )


def _shown(architecture: Architecture) -> str:
    if isinstance(architecture, str):
        return architecture
    return f"{architecture // 10}.{architecture % 10}"
