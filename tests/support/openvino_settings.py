"""Records with what settings models are compiled by OpenVINO."""

from typing import Any

import pytest


def recorded_settings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Returns a list that gets the settings of each model that is compiled from now on."""
    library: Any = pytest.importorskip("openvino")
    seen: list[dict[str, Any]] = []

    class Core(library.Core):
        def compile_model(self, model: Any, device: Any, config: Any) -> Any:
            seen.append(config)
            return super().compile_model(model, device, config)

    monkeypatch.setattr(library, "Core", Core)
    return seen
