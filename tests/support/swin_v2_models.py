"""Tiny models of Swin V2 with random weights."""

from math import log
from typing import Any

import torch
from reference_models import Pair, from_timm, randomize_, timm_features, timm_maps
from torch import Tensor, nn

from fastbb_kernels import WindowGeometry

SHAPE: dict[str, Any] = {"embed_dim": 16, "num_heads": (2, 4, 8, 16), "depths": (2, 1, 1, 2)}
# windows of 8 in an image of 64: shifted ones, one window, and maps below a window
WINDOW = {"window_size": 8, "image_size": 64}
TIMM = "swinv2_tiny_window8_256"


def randomize_swinv2_(model: nn.Module) -> Any:
    """Sets every parameter at random, and scales of cosines from 3 to 30.

    With 100, their limit, rounding in fp32 changes upstream's own maps by more than 1e-5.
    """
    randomize_(model)
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data[:, 0, 0] = torch.linspace(1.0, 3.4, len(parameter))
    return model


def hf_swinv2(model: str = "Backbone", **config: Any) -> Any:
    """A model of transformers, all stages of a backbone selected."""
    import transformers

    depths = config.get("depths", SHAPE["depths"])
    fields = {**SHAPE, **WINDOW, "out_indices": list(range(len(depths) + 1)), "drop_path_rate": 0.0}
    made = transformers.Swinv2Config(**{**fields, **config})
    return randomize_swinv2_(getattr(transformers, f"Swinv2{model}")(made))


def timm_swinv2_pair(**options: Any) -> Pair:
    """timm's features and our TimmBackbone, with every feature selected."""
    settings = {**SHAPE, "window_size": 8, "img_size": 64, "strict_img_size": False, **options}
    upstream = randomize_swinv2_(timm_features(TIMM, **settings))
    ours = from_timm(TIMM, upstream, **settings)
    return Pair(ours, upstream, lambda x: timm_maps(upstream, x))


def timm_block(window: int = 8, shift: int = 4, heads: int = 2) -> Any:
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    block = SwinTransformerV2Block(
        32, (64, 64), heads, window_size=window, shift_size=shift, dynamic_mask=True
    )
    for parameter in block.attn.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.ndim < 2 else 0.3)
    # below and above the limit of the scale
    block.attn.logit_scale.data[:, 0, 0] = torch.linspace(1.0, 6.0, heads)
    return block.eval()


def inputs_of(attention: Any, x: Tensor) -> dict[str, Any]:
    """Arguments of our op for upstream's attention of x [B, H, W, C]."""
    (h, w), heads = attention.window_size, attention.num_heads
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, heads)
    bias = table[attention.relative_position_index.view(-1)].view(h * w, h * w, -1)
    pad = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return {
        "qkv": nn.functional.linear(x, attention.qkv.weight, pad),
        "bias": 16 * torch.sigmoid(bias.permute(2, 0, 1).contiguous()),
        "qkv_pad": pad,
        "num_heads": heads,
        "logit_scale": attention.logit_scale.clamp(max=log(100)).exp().flatten(),
    }


def geometry_of(block: Any) -> WindowGeometry:
    return WindowGeometry(block.window_size, block.shift_size, roll_first=True)


def layer_beyond_the_mask(size: tuple[int, int]) -> tuple[Any, Tensor]:
    """A Swinv2Layer in float64 with windows of 8 and two heads, and a map [2, *size, 32].

    A mask of -100 would leave scores between regions: cosines near -1 within a region, 1 between
    two, times 100.
    """
    from transformers import Swinv2Config
    from transformers.models.swinv2 import modeling_swinv2 as swinv2

    config = Swinv2Config(embed_dim=32, num_heads=[2], depths=[1], window_size=8)
    layer = swinv2.Swinv2Layer(config, 32, (64, 64), 2, shift_size=4).eval().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    own: Any = layer.attention.get_submodule("self")
    own.logit_scale.data.fill_(5.0)
    own.query.weight.data.copy_(-own.key.weight)
    own.query.bias.data.zero_()
    x = torch.randn(32) + 0.1 * torch.randn(2, *size, 32)
    return layer, torch.cat([x[:, :8], -x[:, 8:]], dim=1).double()
