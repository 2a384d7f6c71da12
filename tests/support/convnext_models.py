"""Tiny ConvNeXts of transformers with random weights."""

from typing import Any

import transformers
from reference_models import randomize_

KINDS = ("ConvNext", "ConvNextV2", "DINOv3ConvNext")
SHAPE: dict[str, Any] = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 16, 24, 32]}


def hf_convnext(kind: str = "ConvNext", model: str = "Backbone", **config: Any) -> Any:
    """A tiny model of transformers, all stages selected."""
    made = getattr(transformers, f"{kind}Config")(
        **{**SHAPE, "out_indices": list(range(5)), **config}
    )
    return randomize_(getattr(transformers, f"{kind}{model}")(made))
