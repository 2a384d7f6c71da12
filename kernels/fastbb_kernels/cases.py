"""Inputs of every op at the shapes of real models, and small twins of them.

One list for the tests, the on-device check, the budgets and the benches. Real cases are for the
meta device or a GPU; the twins take the same paths through the kernels (windows, shift, padding,
strides, head dimension) with few pixels and channels, for the interpreter.
"""

from .case import Case
from .resnet_cases import (
    MOBILE,
    RESNETS,
    Depthwise,
    ResNetShape,
    epilogue_cases,
    mobile_cases,
    resnet_cases,
    stem_cases,
)
from .swin_cases import SWINS, SwinShape, swin_cases

# image size (height, width), window of a Swin, batches; the first batch is that of the ledger
REAL_INPUTS = (
    ((224, 224), 7, (64, 8, 1)),
    ((384, 384), 12, (8, 64, 1)),
    ((800, 1088), 7, (8, 64, 1)),
)


MODELS = (*SWINS, *RESNETS)


def model_cases(model: str, size: tuple[int, int], batch: int) -> list[Case]:
    """Every distinct call of one forward of a model of `MODELS` at a size of `REAL_INPUTS`."""
    if model in RESNETS:
        return list(resnet_cases(RESNETS[model], size, batch))
    windows = {size: window for size, window, _ in REAL_INPUTS}
    return list(swin_cases(SWINS[model], size, windows[size], batch))


def checked_cases() -> list[Case]:
    """What every run of the tests compiles: Swin-T and -B, ResNet-50 and -18, mobile networks."""
    models = [
        case
        for model in ("swin_t", "swin_b", "resnet50")
        for size, _, batches in REAL_INPUTS
        for case in model_cases(model, size, batches[0])
    ]
    # a 3x3 with a residual and a strided 1x1, which ResNet-50 has not
    basic = model_cases("resnet18", (224, 224), 64)
    epilogues = epilogue_cases("resnet50-224-b64-stage1", (64, 64, 56, 56))
    return [*models, *basic, *epilogues, *mobile_cases(MOBILE, 64)]


def real_cases() -> list[Case]:
    """`checked_cases`, then the other models and the batches 1, 8 and 64."""
    models = [
        case
        for model in MODELS
        for size, _, batches in REAL_INPUTS
        for batch in batches
        for case in model_cases(model, size, batch)
    ]
    mobile = [case for batch in REAL_INPUTS[0][2] for case in mobile_cases(MOBILE, batch)]
    cases = [*checked_cases(), *models, *mobile]
    return list({case.name: case for case in cases}.values())


def small_cases() -> list[Case]:
    """Twins of the real cases, for the interpreter: seconds, not hours."""
    swins = (
        # whole windows; padded ones and odd maps to merge; window 12; a map below the window
        (SwinShape("whole", 32, (2, 2), (1, 2)), (56, 56), 7, 1),
        (SwinShape("padded", 32, (2, 2), (2, 1)), (37, 50), 7, 2),
        (SwinShape("window12", 32, (2,), (1,)), (48, 60), 12, 1),
        (SwinShape("below", 32, (2,), (2,)), (14, 21), 7, 3),
    )
    resnets = (
        # odd maps at every stride; tails of the width that has a kernel
        (ResNetShape("basic", "basic", (2, 1), 16), (37, 50), 2),
        (ResNetShape("bottleneck", "bottleneck", (2, 2), 16), (45, 38), 2),
        (ResNetShape("tail", "bottleneck", (2,), 64), (29, 26), 1),
    )
    mobile = (Depthwise(24, 9, 3, 1, "silu"), Depthwise(40, 11, 5, 2, "hardswish"))
    return [
        *(case for twin in swins for case in swin_cases(*twin)),
        *(case for twin in resnets for case in resnet_cases(*twin)),
        *stem_cases((19, 25), 2, "small"),
        *epilogue_cases("small", (2, 24, 7, 5)),
        *mobile_cases(mobile, 2, "small"),
    ]
