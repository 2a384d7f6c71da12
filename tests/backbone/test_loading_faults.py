"""Files without usable weights: integer dtypes, nested or foreign dictionaries, broken pickles."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fastbb import AutoBackbone, ResNetBackbone, ResNetConfig, SwinBackbone, SwinConfig
from fastbb.backbone.checkpoint import check_dtypes, load_strict, read_state_dict, read_weights_file
from fastbb.cli import main

SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
WANTED = "must be float32, float16, bfloat16 or float64"
FORMATS = ["model.safetensors", "pytorch_model.bin"]


def save_timm(folder: Path) -> None:
    import timm

    config = {"architecture": "test_resnet", "pretrained_cfg": {"num_classes": 1000}}
    (folder / "config.json").write_text(json.dumps(config))
    state = timm.create_model("test_resnet").state_dict()
    save_file({name: t.clone() for name, t in state.items()}, folder / "model.safetensors")


# for each kind of model: how it is saved, and one of its weights
MODELS = {
    "resnet": (
        lambda folder: ResNetBackbone(ResNetConfig(**RESNET)).save_pretrained(folder),
        "encoder.stages.0.layers.0.shortcut.convolution.weight",
    ),
    "swin": (
        lambda folder: SwinBackbone(SwinConfig(**SWIN)).save_pretrained(folder),
        "encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
    ),
    "timm": (save_timm, "layer1.0.conv1.weight"),
}
# part of the name in the error
CALLED = {
    "resnet": "layers.0.shortcut.convolution.weight",
    "swin": "relative_position_bias.relative_position_bias_table",
    "timm": "layer1.0.conv1.weight",
}


@pytest.fixture(params=MODELS)
def model(request: Any, tmp_path: Path) -> tuple[str, Path, dict[str, Tensor], str]:
    """Kind of model, directory with its config.json, tensors, and the name of one of them."""
    save, weight = MODELS[request.param]
    save(tmp_path)
    state = read_state_dict(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    return request.param, tmp_path, state, weight


def write(folder: Path, filename: str, state: Any) -> None:
    if filename.endswith(".safetensors"):
        save_file(state, folder / filename)
    else:
        torch.save(state, folder / filename)


def command_line(folder: Path, tmp_path: Path) -> str:
    """Returns the error that `fastbb extract` prints for a model that it refuses."""
    Image.new("RGB", (9, 8)).save(tmp_path / "image.png")
    processor = '{"image_processor_type": "ViTImageProcessor"}'  # which is looked for first
    (folder / "preprocessor_config.json").write_text(processor)
    arguments = ["extract", str(tmp_path / "image.png"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--model", str(folder)])
    assert result.exit_code == 2, result.output
    return result.stderr


WRONG = {
    "int8": lambda t: t.to(torch.int8),
    "int64": lambda t: t.to(torch.int64),
    "bool": lambda t: t.to(torch.bool),
    "float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda t: t.to(torch.float8_e5m2),
    "complex64": lambda t: t.to(torch.complex64),
    "qint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # of quantized tensors, which PyTorch gives up
@pytest.mark.parametrize("filename", FORMATS)
@pytest.mark.parametrize("dtype", WRONG)
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}], ids=["as-saved", "converted"])
def test_weights_that_are_not_floating_are_refused(
    model: Any, dtype: str, filename: str, options: dict[str, Any]
) -> None:
    kind, folder, state, weight = model
    if dtype == "qint8" and filename.endswith(".safetensors"):
        pytest.skip("safetensors has no quantized tensors")
    write(folder, filename, {**state, weight: WRONG[dtype](state[weight])})
    with pytest.raises(ValueError, match=WANTED) as error:
        AutoBackbone.from_pretrained(folder, **options)
    assert f"{CALLED[kind]} is torch.{dtype}:" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bin_of_parameters_loads_as_buffers_and_parameters(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetBackbone(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {
        name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in read_weights_file(path).items()
    }
    path.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    backbone = AutoBackbone.from_pretrained(tmp_path)
    assert not any(buffer.requires_grad for buffer in backbone.buffers())
    backbone(torch.zeros(1, 3, 32, 32))
    meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    torch.save(meta, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="without values, on the meta device: embedder"):
        AutoBackbone.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), MemoryError()], ids=repr
)
def test_errors_of_unreadable_files_do_not_say_delete_it(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("torch.load", fails)
    with pytest.raises((OSError, MemoryError)) as raised:
        read_weights_file(tmp_path / "pytorch_model.bin")
    assert "delete it" not in str(raised.value)


def test_command_refuses_integer_weights_in_one_line(model: Any, tmp_path: Path) -> None:
    kind, folder, state, weight = model
    write(folder, "model.safetensors", {**state, weight: state[weight].to(torch.int8)})
    message = command_line(folder, tmp_path)
    assert WANTED in message and CALLED[kind] in message and message.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_floating_dtype_of_weights_loads(model: Any, dtype: torch.dtype) -> None:
    _, folder, state, _ = model
    write(folder, "model.safetensors", {n: t.to(dtype) for n, t in state.items()})
    assert AutoBackbone.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_integer_buffers_and_unused_integers_are_allowed() -> None:
    norm = torch.nn.BatchNorm2d(2)
    state: dict[str, Any] = dict(norm.state_dict()) | {"x.position_ids": torch.arange(3)}
    load_strict(norm, state, what="a norm", unused=("*.position_ids",))
    check_dtypes({"head": torch.ones(1, dtype=torch.int8)}, ["weight"], "a norm")


NESTED = {
    "model": (lambda state: {"model": state}, "entry 'model' is of type dict"),
    "deeper": (lambda state: {"a": {"b": torch.ones(1)}}, "entry 'a' is of type dict"),
    "beside": (lambda state: state | {"optimizer": {"lr": 1}}, "entry 'optimizer' is of type dict"),
    "number": (lambda state: {"epoch": 3}, "entry 'epoch' is of type int"),
    "list": (lambda state: {"x": [torch.ones(1)]}, "entry 'x' is of type list"),
    "names": (lambda state: {0: torch.ones(1)}, "name of its entry 0 is of type int"),
    "inside": (lambda state: {"state_dict": {"a": 1}}, "entry 'a' is of type int"),
    "empty-handed": (lambda state: {"state_dict": None}, "got NoneType"),
    "tuple": (lambda state: (state,), "got tuple"),
    "tensor": (lambda state: torch.ones(2), "got Tensor"),
}


@pytest.mark.parametrize("content", NESTED)
def test_bin_file_without_tensors_is_refused_with_the_name_of_its_entry(
    model: Any, content: str
) -> None:
    kind, folder, state, _ = model
    make, message = NESTED[content]
    write(folder, "pytorch_model.bin", make(state))
    if (kind, content) == ("timm", "model"):  # which timm unwraps
        assert AutoBackbone.from_pretrained(folder).config.backbone == "test_resnet"
        return
    with pytest.raises(OSError, match=f"must .* a dictionary of tensors, .*{message}") as error:
        AutoBackbone.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_the_command_refuses_a_nested_file_in_one_line(model: Any, tmp_path: Path) -> None:
    _, folder, _, _ = model
    write(folder, "pytorch_model.bin", {"a": {"b": torch.ones(1)}})
    message = command_line(folder, tmp_path)
    assert "its entry 'a' is of type dict: wanted" in message and message.count("\n") == 1


def test_the_state_dict_of_a_training_run_loads(model: Any) -> None:
    _, folder, state, _ = model
    write(folder, "pytorch_model.bin", {"state_dict": state, "epoch": 3})
    assert AutoBackbone.from_pretrained(folder).channels


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"cos\nsystem\n.", b"\x80\x04]}.", b"\0" * 64], ids=repr
)
def test_any_error_of_the_unpickler_becomes_an_os_error_of_one_line(
    model: Any, data: bytes
) -> None:
    _, folder, _, _ = model
    (folder / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(OSError, match=r"pytorch_model\.bin (is corrupt, tr|must hold)") as error:
        AutoBackbone.from_pretrained(folder)
    assert "\n" not in str(error.value)
