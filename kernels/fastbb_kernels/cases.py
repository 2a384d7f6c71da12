"""Inputs of every op at the shapes of real models, and small variants of them.

One list for the tests, the on-device check, the budgets and the benches. Real cases are for the
meta device or a GPU. The small variants have few pixels and channels and are for the interpreter;
they take the same paths through the kernels (windows, shift, padding, strides, head dimension).
"""

from importlib import import_module
from pathlib import Path

from .case import REAL_INPUTS, Case, Family

FAMILIES: tuple[Family, ...] = tuple(
    import_module(f".{path.stem}", __package__).FAMILY
    for path in sorted(Path(__file__).parent.glob("*_cases.py"))
)

MODELS = tuple(model for family in FAMILIES for model in family.models)


def model_cases(model: str, size: tuple[int, int], batch: int) -> list[Case]:
    """Returns each distinct call of a forward of a model of `MODELS` at a size of `REAL_INPUTS`."""
    (family,) = (family for family in FAMILIES if model in family.models)
    return list(family.model_cases(model, size, batch))


def checked_cases() -> list[Case]:
    """Returns the cases that every run of the tests compiles."""
    cases = []
    for family in FAMILIES:
        for model in family.checked_models:
            for size, batches in REAL_INPUTS:
                cases += family.model_cases(model, size, batches[0])
        cases += family.more_checked()
    return cases


def real_cases() -> list[Case]:
    """Returns `checked_cases`, then the other models and the batches 1, 8 and 64."""
    cases = checked_cases()
    for model in MODELS:
        for size, batches in REAL_INPUTS:
            for batch in batches:
                cases += model_cases(model, size, batch)
    for family in FAMILIES:
        for batch in REAL_INPUTS[0][1]:
            cases += family.more_real(batch)
    return list({case.name: case for case in cases}.values())


def small_cases() -> list[Case]:
    """Returns small variants of the real cases: the interpreter runs them in seconds."""
    return [case for family in FAMILIES for case in family.small()]
