"""Compares features of fastbb with those of the models' own libraries, as a table in Markdown.

    python scripts/embedding_parity.py > docs/benchmarks/embeddings.md

Models are small and have random weights; nothing is downloaded. Errors are the largest difference,
relative to the largest magnitude of the reference.
"""

import datetime
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torchvision
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from feature_models import (
    PICTURES,
    TIMM_MODELS,
    gap,
    pixels_of,
    save_processor,
    save_timm,
    without_classifier,
)
from reference_models import hf_resnet, hf_swin, randomize_, torchvision_resnet, torchvision_swin

from fastbb import AutoBackbone, AutoImageProcessor
from fastbb.extraction import FeatureExtractor

Row = tuple[str, str, str, float]


def of_transformers(directory: Path) -> Iterator[Row]:
    for name, like in (("Swin", hf_swin(window_size=4)), ("ResNet", hf_resnet())):
        fields = {**like.config.to_dict(), "out_features": None, "out_indices": [4]}
        model = getattr(transformers, f"{name}Model")(type(like.config).from_dict(fields))
        randomize_(model).save_pretrained(directory / name)
        save_processor(directory / name)
        output = model(pixels_of(directory / name))
        expected = {"embedding": (output.pooler_output.flatten(1), "pooler_output")}
        if name == "Swin":
            tokens = output.last_hidden_state
            expected["tokens"] = (tokens, "last_hidden_state")
            expected["patch_mean"] = (tokens.mean(1), "last_hidden_state.mean(1)")
        got = FeatureExtractor(directory / name, list(expected))(PICTURES)
        for feature, (reference, what) in expected.items():
            error = gap(got[feature], reference)
            yield feature, name, f"transformers {name}Model, `{what}`", error


def of_torchvision() -> Iterator[Row]:
    for name, head, model in (
        ("swin", "head", torchvision_swin()),
        ("resnet", "fc", torchvision_resnet()),
    ):
        backbone = AutoBackbone.from_torchvision(None, model)
        processor = AutoImageProcessor.from_pretrained("nano-resnet-digits")
        setattr(model, head, torch.nn.Identity())
        got = FeatureExtractor(backbone, processor=processor)(PICTURES)["embedding"]
        error = gap(got, model(processor(PICTURES).pixel_values))
        yield "embedding", name, f"torchvision {type(model).__name__}, without `{head}`", error


def of_timm(directory: Path) -> Iterator[Row]:
    no_norm = torch.nn.Identity()
    for name, (size, options) in TIMM_MODELS.items():
        if not timm.is_model(name):
            continue
        model = save_timm(directory / name, name, size, **options)
        pixels = pixels_of(directory / name)
        expected = {
            "embedding": (without_classifier(model, name, **options)(pixels), "num_classes=0")
        }
        tokens = model.forward_features(pixels)
        if tokens.ndim == 3 and not isinstance(getattr(model, "norm", no_norm), torch.nn.Identity):
            expected["tokens"] = (tokens, "forward_features")
            if getattr(model, "cls_token", None) is not None:
                expected["cls"] = (tokens[:, 0], "forward_features[:, 0]")
        got = FeatureExtractor(directory / name, list(expected))(PICTURES)
        for feature, (reference, what) in expected.items():
            yield feature, name, f"timm, `{what}`", gap(got[feature], reference)


def main() -> None:
    warnings.simplefilter("ignore")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        rows = [*of_transformers(Path(folder)), *of_torchvision(), *of_timm(Path(folder))]
    print("# Features against the models' own libraries\n")
    print(
        "The largest difference in fp32, relative to the largest magnitude of the reference. The "
        "models have the architecture of that name, mostly with fewer layers and channels, and "
        "random weights.\n"
    )
    print("| feature | model | reference | error |\n|---|---|---|---|")
    for feature, model, reference, error in rows:
        print(f"| `{feature}` | {model} | {reference} | {error:.1e} |")
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    versions += f", transformers {transformers.__version__}, timm {timm.__version__}"
    print(
        f"\n`python scripts/embedding_parity.py > docs/benchmarks/embeddings.md`, {versions}, "
        f"{platform.machine()} CPU, {datetime.date.today()}."
    )


if __name__ == "__main__":
    main()
