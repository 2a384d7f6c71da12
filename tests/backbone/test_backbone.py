"""`BackboneOutput`, and backbones as nn.Modules."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from reference_models import randomize_
from tolerance import assert_equals_upstream
from torch import nn
from torch.utils._pytree import tree_map

from fastbb import AutoBackbone, BackboneOutput, SwinBackbone, SwinConfig

SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
PIXELS = torch.randn(2, 3, 36, 28)


def swin(**kwargs) -> Any:
    return randomize_(SwinBackbone(SwinConfig(**SWIN, **kwargs)))


class TestOutput:
    maps = (torch.zeros(1), torch.ones(1))

    def test_output_is_object_dictionary_and_tuple(self):
        output = BackboneOutput(self.maps)
        assert output.feature_maps is output["feature_maps"] is output[0] is self.maps
        assert output.hidden_states is None and output.attentions is None
        assert output[:1] == output.to_tuple() == (self.maps,)
        assert isinstance(output, dict) and list(output) == ["feature_maps"]
        assert dict(**output) == {"feature_maps": self.maps}
        with pytest.raises(KeyError):
            output["attentions"]

    @pytest.mark.parametrize(
        "again",
        [
            lambda output: output.copy(),
            lambda output: copy.deepcopy(output),
            lambda output: type(output)(dict(output)),
            lambda output: tree_map(lambda x: x.clone(), output),
        ],
        ids=["copy", "deepcopy", "rebuilt", "tree_map"],
    )
    def test_output_survives_copying_and_rebuilding(self, again):
        rebuilt: Any = again(BackboneOutput(self.maps, attentions=self.maps))
        assert type(rebuilt) is BackboneOutput and isinstance(rebuilt.feature_maps, tuple)
        assert torch.equal(rebuilt.feature_maps[1], self.maps[1])
        assert rebuilt.hidden_states is None and len(rebuilt.attentions or ()) == 2


@torch.no_grad()
def test_hidden_states_can_be_requested_by_index():
    backbone = swin(out_indices=[1])
    every = backbone(PIXELS, output_hidden_states=True).hidden_states
    some = backbone(PIXELS, output_hidden_states=[-1]).hidden_states
    assert [state is None for state in some] == [True, True, False]
    assert torch.equal(some[2], every[2])
    assert backbone(PIXELS, output_hidden_states=0).hidden_states is None
    with pytest.raises(ValueError, match=r"indices of the 3 stages, got \[10\]"):
        backbone(PIXELS, output_hidden_states=[10])


@torch.no_grad()
def test_transformers_configurations_are_accepted():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(**SWIN, out_indices=[1, 2])
    backbone = AutoBackbone.from_config(config)
    assert type(backbone.config) is SwinConfig and backbone.channels == [8, 16]
    assert SwinBackbone(config).out_indices == [1, 2]


class Wrapper(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lambda module: module, Wrapper], ids=["bare", "wrapped"])
def test_state_dict_of_a_transformers_model_loads(wrap):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(**SWIN, out_indices=[2])
    upstream = randomize_(transformers.SwinBackbone(config))
    backbone = swin(out_indices=[1, 2])
    with pytest.warns(UserWarning, match="no norm for stage1:"):
        wrap(backbone).load_state_dict(wrap(upstream).state_dict())
    maps = backbone(PIXELS).feature_maps
    assert_equals_upstream(maps[1], upstream(PIXELS).feature_maps[0])
    # the missing norm is the identity, not the norm of older weights
    assert torch.equal(backbone.hidden_states_norms["stage1"].weight, torch.ones(8))


def test_a_state_dict_of_our_own_keeps_every_norm(recwarn):
    one, other = swin(), swin()
    other.load_state_dict(one.state_dict())
    other.out_indices = [0, 1, 2]
    one.out_indices = [0, 1, 2]
    with torch.no_grad():
        assert_equals_upstream(other(PIXELS).feature_maps, one(PIXELS).feature_maps, rel=0)
    assert not [w for w in recwarn if "norm" in str(w.message)]
    with pytest.raises(RuntimeError, match="Missing key.*fc1"):
        lost = OrderedDict((k, v) for k, v in one.state_dict().items() if "fc1" not in k)
        other.load_state_dict(lost)


def test_weights_loaded_in_inference_mode_can_be_trained(tmp_path):
    swin().save_pretrained(tmp_path)
    with torch.inference_mode():
        backbone = AutoBackbone.from_pretrained(tmp_path)
    backbone.train()(PIXELS).feature_maps[0].sum().backward()
    assert backbone.swin.embeddings.norm.weight.grad is not None


@torch.no_grad()
def test_deepcopy_is_independent():
    backbone = swin()
    twin = copy.deepcopy(backbone)
    twin.swin.embeddings.norm.weight.zero_()
    twin.out_indices = [0]
    assert backbone.out_indices == [2]
    assert not torch.equal(twin(PIXELS).feature_maps[0], backbone(PIXELS).feature_maps[0])


def test_backward_hooks_and_replaced_forwards_run():
    backbone = swin()
    fc1 = backbone.swin.encoder.layers[0].blocks[0].mlp.fc1
    seen = []
    handle = fc1.register_full_backward_hook(lambda *_: seen.append(1))
    before = backbone(PIXELS).feature_maps[-1]
    before.sum().backward()
    assert seen == [1]
    handle.remove()
    fc1.forward = lambda x: type(fc1).forward(fc1, x) + 1
    assert not torch.allclose(backbone(PIXELS).feature_maps[-1], before)
    del fc1.forward
    assert_equals_upstream(backbone(PIXELS).feature_maps[-1], before)


def test_unknown_arguments_are_refused(tmp_path):
    swin().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="SwinConfig has no field out_indicies; its fields are"):
        AutoBackbone.from_pretrained(tmp_path, out_indicies=[0])
    with pytest.raises(ValueError, match="model_type 'dict' is not supported"):
        AutoBackbone.from_pretrained(tmp_path, config={})  # type: ignore[arg-type]  # the point
    for dtype in ("int64", torch.int8):
        with pytest.raises(ValueError, match="dtype must be a floating torch.dtype"):
            AutoBackbone.from_pretrained(tmp_path, dtype=dtype)
    assert AutoBackbone.from_pretrained(tmp_path, torch_dtype="bfloat16").dtype == torch.bfloat16


def test_saving_writes_nothing_if_the_configuration_is_not_json(tmp_path):
    backbone = swin()
    backbone.config.note = object()
    with pytest.raises(TypeError):
        backbone.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors"))


@torch.no_grad()
def test_the_attention_mask_is_not_repeated_for_each_image():
    # a batch must not cost more than its own windows: no copy of the bias per image
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-2:] == (49, 49):
                largest = max(largest, out.numel())
            return out

    config = SwinConfig(**{**SWIN, "window_size": 7})
    backbone, sizes = SwinBackbone(config), []
    for batch in (1, 8):
        largest = 0
        # without oneDNN all windows are computed by the ops
        with torch.backends.mkldnn.flags(enabled=False), Watch():
            backbone(torch.randn(batch, 3, 64, 64))
        sizes.append(largest)
    assert sizes[0] == sizes[1] > 0
