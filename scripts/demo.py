"""Extracts features of real images offline, and shows them.

    make demo

Writes ./demo-output. The models are the two bundled nano networks, which were trained on
handwritten digits only; the photos come from scikit-image.
"""

import shutil
import sys
from pathlib import Path

import torch
from PIL import Image
from skimage import data
from train_nano import digits_split

import fastbb
from fastbb import AutoBackbone, AutoImageProcessor
from fastbb.inspect.contact_sheet import contact_sheet
from fastbb.inspect.features_report import report as write_report
from fastbb.inspect.view import view

OUT = Path("demo-output")
MODELS = ("nano-swin-digits", "nano-resnet-digits")
PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "rocket")
N_NEIGHBOURS = 5
SMALLEST_ACCURACY = 0.95


def write_images() -> None:
    """Writes digits/<digit>/<number>.png and photos/<name>.jpg, the last photo cut in half."""
    _, held_out = digits_split()
    for number, (image, label) in enumerate(zip(held_out.images, held_out.labels)):
        folder = OUT / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:03}.png")
    folder = OUT / "photos"
    folder.mkdir()
    for name in PHOTOS:
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.jpg", quality=95)
    whole = (folder / "rocket.jpg").read_bytes()
    (folder / "rocket-cut-off.jpg").write_bytes(whole[: len(whole) // 2])


def knn_accuracy(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share of rows whose nearest other rows, by cosine, vote for the right class.

    Args:
        features: fp32 [n, C].
        labels: int64 [n], 0..9.
    """
    unit = torch.nn.functional.normalize(features)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    votes = labels[similarity.topk(N_NEIGHBOURS).indices]
    predicted = torch.nn.functional.one_hot(votes, 10).sum(1).argmax(1)
    return (predicted == labels).double().mean().item()


def digits_sheet(model: str) -> Image.Image:
    """Draws the maps of every stage of a model for one held-out image of each digit."""
    backbone = AutoBackbone.from_pretrained(model)
    backbone.out_features = backbone.stage_names[1:]
    paths = [min((OUT / "digits" / str(digit)).iterdir()) for digit in range(10)]
    pixel_values = AutoImageProcessor.from_pretrained(model)(paths)["pixel_values"]
    with torch.no_grad():
        maps = backbone(pixel_values).feature_maps
    images = [Image.open(path) for path in paths]
    title = f"held-out digits · {model}"
    return contact_sheet(images, maps, backbone.out_features, title=title)


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    write_images()
    good = True

    print("handwritten digits that the models have not seen (scikit-learn's, 8 x 8 pixels)")
    for model in MODELS:
        directory = OUT / "features" / f"digits-{model}"
        report = fastbb.extract(model, OUT / "digits", directory, progress=False)
        features = fastbb.open_features(report.directory)
        labels = torch.tensor([int(id.split("/")[0]) for id in features.ids])
        accuracy = knn_accuracy(features["embedding"], labels)
        good = good and accuracy >= SMALLEST_ACCURACY and not report.errors
        print(f"  {report}")
        print(f"    embeddings {tuple(features['embedding'].shape)}")
        print(
            f"    k-NN accuracy {accuracy:.1%} ({SMALLEST_ACCURACY:.0%} expected): "
            f"the digit is told by the {N_NEIGHBOURS} others with the closest features"
        )

    print("photos (scikit-image's, and one that is cut off on purpose)")
    directory = OUT / "features" / "photos"
    report = fastbb.extract(MODELS[0], OUT / "photos", directory, size=(224, 224), progress=False)
    features = fastbb.open_features(report.directory)
    good = good and features.ids == [f"{name}.jpg" for name in PHOTOS]
    print(f"  {report}")
    for error in features.errors():
        print(f"    row {error.row} has no features: {error.id}: {error.kind}, {error.message}")

    sheets = OUT / "sheets"
    sheets.mkdir()
    for model in MODELS:
        digits_sheet(model).save(sheets / f"digits-{model}.png")
        for name in PHOTOS:
            view(OUT / "photos" / f"{name}.jpg", model, sheets / f"{name}-{model}.png")
    print(f"what every stage makes of them: {len(list(sheets.iterdir()))} contact sheets, such as")
    print(f"  {sheets / f'digits-{MODELS[0]}.png'}   (stage4: nearly one colour for each digit)")
    print(f"  {sheets / f'astronaut-{MODELS[0]}.png'}   (colours: the legend says)")

    page = write_report(OUT / "features" / f"digits-{MODELS[0]}", OUT / "digits.html")
    print(f"a page about the features of the digits, with their nearest neighbours: {page}")

    print(NEXT)
    if not good:
        print("demo: the features are not what they should be, see above", file=sys.stderr)
    return 0 if good else 1


NEXT = """
Try next, with your own images (the model is a toy that knows digits only):
  .venv/bin/fastbb extract ~/Pictures --out features --model nano-swin-digits
  .venv/bin/fastbb extract ~/Pictures --out features --update      (new images only)
  .venv/bin/fastbb show features
  .venv/bin/fastbb view photo.jpg --model nano-swin-digits -o view.png
and with a real model (downloaded once):
  .venv/bin/fastbb extract ~/Pictures --out swin --model microsoft/swin-tiny-patch4-window7-224
"""

if __name__ == "__main__":
    sys.exit(main())
