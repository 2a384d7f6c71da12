"""The core works where transformers is not installed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# stands in for an environment without the extra
BLOCKER = """
import sys
from importlib.abc import MetaPathFinder

class NoTransformers(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

sys.meta_path.insert(0, NoTransformers())
"""


def run(code: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", BLOCKER + textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transformers_cannot_be_imported_here(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="No module named 'transformers'"):
        run("import transformers", tmp_path)


def test_backbones_build_save_and_load_without_transformers(tmp_path: Path) -> None:
    out = run(
        """
        import torch
        import fastbb
        from fastbb import (
            AutoBackbone, ResNetBackbone, ResNetConfig, SwinBackbone, SwinConfig, TimmBackbone,
            TimmBackboneConfig, list_backbones,
        )

        torch.set_num_threads(1)
        models = {
            "swin": SwinBackbone(SwinConfig(
                embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4, out_indices=[0, 2])),
            "resnet": ResNetBackbone(ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
            "timm": TimmBackbone(TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 3])),
        }
        x = torch.randn(2, 3, 40, 44)
        for name, model in models.items():
            model.eval().save_pretrained(name)
            again = AutoBackbone.from_pretrained(name)
            assert type(again) is type(model)
            with torch.no_grad():
                maps, wanted = again(x).feature_maps, model(x).feature_maps
            assert len(maps) == len(model.channels)
            assert all(map(torch.equal, maps, wanted))
            assert model.backbone_type.value == ("timm" if name == "timm" else "transformers")
            fresh = AutoBackbone.from_config(model.config)
            fresh.train()(x).feature_maps[-1].sum().backward()
        assert list_backbones()
        print("done")
        """,
        tmp_path,
    )
    assert out.endswith("done\n")


def test_images_are_processed_and_extracted_without_transformers(tmp_path: Path) -> None:
    out = run(
        f"""
        from pathlib import Path
        import numpy as np
        import torch
        from PIL import Image
        import fastbb
        from fastbb import AutoBackbone, AutoImageProcessor

        torch.set_num_threads(1)
        model = Path({str(ROOT)!r}) / "fastbb" / "assets" / "nano-swin-digits"
        Path("photos").mkdir()
        rng = np.random.default_rng(0)
        for i in range(3):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"photos/{{i}}.png")

        processor = AutoImageProcessor.from_pretrained(model)
        inputs = processor(Image.open("photos/0.png"))
        with torch.no_grad():
            maps = AutoBackbone.from_pretrained(model)(inputs["pixel_values"]).feature_maps
        assert maps[-1].isfinite().all()

        fastbb.extract(model, ["photos"], out="features")
        features = fastbb.open_features("features")
        assert list(features.ids) == ["0.png", "1.png", "2.png"], features.ids
        pooled = np.asarray(features["embedding"])
        assert pooled.shape[0] == 3 and np.isfinite(pooled).all()
        print("done")
        """,
        tmp_path,
    )
    assert out.endswith("done\n")


def test_names_that_need_transformers_say_how_to_install_it(tmp_path: Path) -> None:
    out = run(
        """
        import fastbb
        from fastbb import *

        for name in (
            "heads", "register", "unregister", "MaskFormerConfig",
            "MaskFormerForInstanceSegmentation",
        ):
            assert name in dir(fastbb)
            try:
                getattr(fastbb, name)
            except ImportError as error:
                assert "pip install fastbb[transformers]" in str(error), error
            else:
                raise AssertionError(name)
        print("done")
        """,
        tmp_path,
    )
    assert out.endswith("done\n")
