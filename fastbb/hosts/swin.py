"""Swin inside models of transformers, timm and torchvision: blocks, mergings, whole backbones."""

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from fastbb_kernels import WindowGeometry, layer_norm_nchw, patch_embed

from ..models.swin_compute import (
    SwinStage,
    block_weights,
    cuts_patches,
    merge_patches,
    swin_block,
    swin_stage,
)
from ..models.swin_weights import PatchMergingWeights, SwinBlockSpec, SwinBlockWeights
from ..weights.folding import activation_name
from .region import TransformersRegion, check_parts
from .replacement import Fast, HowToRun, Refused


class _SwinBlock(Fast):
    """A block of any library: its semantics, read when it is made, and its weights."""

    reads_settings = True

    def __init__(self, module: nn.Module, how: HowToRun) -> None:
        super().__init__(module, how)
        check_parts(module)
        block: Any = module
        self._norms = self.norms(block)
        self._linears = self.linears(block)
        if any(type(norm) is not nn.LayerNorm for norm in self._norms):
            raise Refused("its norms are not layer norms")
        if any(type(linear) is not nn.Linear for linear in self._linears):
            raise Refused("its linear layers are not torch's own")
        *_, proj, fc1, _ = self._linears
        self._channels = proj.out_features
        if proj.in_features != proj.out_features:
            raise Refused("its heads have a size of their own")
        usual = (self._channels // self.num_heads()) ** -0.5
        scale = self.scale()
        if scale is not None and not (isinstance(scale, (int, float)) and scale == usual):
            raise Refused(f"its attention scale is {scale!r:.40}, the usual one {usual:.4g}")
        activation = activation_name(self.activation(block))
        if activation is None:
            raise Refused(f"its activation is a {type(self.activation(block)).__name__}")
        self._activation = activation
        if fc1.bias is None:
            raise Refused("its MLP has no bias")

    def norms(self, block: Any) -> tuple[nn.LayerNorm, nn.LayerNorm]:
        """Those before the attention and the MLP."""
        return block.norm1, block.norm2

    def linears(self, block: Any) -> tuple[nn.Linear, ...]:
        """Projections to queries, keys and values (one or three), to the output, fc1 and fc2."""
        return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2

    def activation(self, block: Any) -> nn.Module:
        return block.mlp.act

    def table(self) -> Tensor:
        """The relative position bias table."""
        return self.module.attn.relative_position_bias_table

    def index(self) -> Tensor:
        """Which row of the table each pair of tokens takes."""
        return self.module.attn.relative_position_index

    def scale(self) -> float | None:
        """What scores are multiplied by; None where that follows from the size of the heads."""
        return None

    def geometry(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Window and shift, as they are now."""
        return tuple(self.module.window_size), tuple(self.module.shift_size)

    def num_heads(self) -> int:
        return self.module.attn.num_heads

    roll_first = False
    clamp_shift = False

    def spec(self) -> SwinBlockSpec:
        window, shift = self.geometry()
        return SwinBlockSpec(
            num_heads=self.num_heads(),
            geometry=WindowGeometry(window, shift, roll_first=self.roll_first),
            clamp_shift=self.clamp_shift,
            activation=self._activation,
        )

    def weights(self) -> SwinBlockWeights:
        *projections, proj, fc1, fc2 = self._linears
        window, _ = self.geometry()
        linears = proj, fc1, fc2
        table, index = self.table(), self.index()
        return block_weights(self.module, self._norms, projections, linears, table, window, index)

    def why_table(self) -> str | None:
        """Why table and index are not those of the window, or None."""
        (height, width), _ = self.geometry()
        if self.table().shape[0] != (2 * height - 1) * (2 * width - 1):
            return f"its bias table is not for windows of {height}x{width}"
        if self.index().numel() != (height * width) ** 2:
            return f"its index of the bias table is not for windows of {height}x{width}"
        return None

    def likeness(self) -> Hashable:
        return type(self).__name__, self._channels, self.num_heads(), *self.geometry()

    def why_not(self, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return self.why_table()

    def forward(self, x: Tensor) -> Tensor:
        return swin_block(x, self.spec(), self.weights())


class TimmSwinBlock(_SwinBlock):
    roll_first = True

    def scale(self) -> float | None:
        return self.module.attn.scale

    def why_not(self, x: Tensor) -> str | None:
        block = self.module
        if not getattr(block, "dynamic_mask", False) and x.shape[1:3] != block.input_resolution:
            return "it was built for maps of another size"
        return self.why_table()


class TorchvisionSwinBlock(_SwinBlock):
    clamp_shift = True

    def linears(self, block: Any) -> tuple[nn.Linear, ...]:
        return block.attn.qkv, block.attn.proj, block.mlp[0], block.mlp[3]

    def activation(self, block: Any) -> nn.Module:
        return block.mlp[1]

    def geometry(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return tuple(self.module.attn.window_size), tuple(self.module.attn.shift_size)


class TransformersSwinBlock(_SwinBlock):
    """SwinLayer: tokens [B, H * W, C] and (H, W)."""

    read_at_every_call = ("window_size", "shift_size")  # its own forward changes them

    def norms(self, block: Any) -> tuple[nn.LayerNorm, nn.LayerNorm]:
        return block.layernorm_before, block.layernorm_after

    def linears(self, block: Any) -> tuple[nn.Linear, ...]:
        attention = block.attention
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        return *projections, attention.o_proj, block.mlp.fc1, block.mlp.fc2

    def activation(self, block: Any) -> nn.Module:
        return block.mlp.activation_fn

    def table(self) -> Tensor:
        return self.module.attention.relative_position_bias.relative_position_bias_table

    def index(self) -> Tensor:
        return self.module.attention.relative_position_bias.relative_position_index

    def scale(self) -> float | None:
        return self.module.attention.scaling

    def geometry(self) -> tuple[tuple[int, int], tuple[int, int]]:
        window, shift = int(self.module.window_size), int(self.module.shift_size)
        return (window, window), (shift, shift)

    def num_heads(self) -> int:
        return self.module.attention.num_attention_heads

    def why_not(
        self,
        x: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs: Any,
    ) -> str | None:
        config = self.module.attention.config
        if kwargs.get("output_attentions", config.output_attentions):
            return "attention weights are asked for"
        if config._attn_implementation not in ("eager", "sdpa"):
            return f"attn_implementation={config._attn_implementation!r} is the host's choice"
        if config._attn_implementation == "eager" and self.module._forward_hooks:
            return "it has hooks, which may look at the attention weights"
        if not always_partition:
            self.module.set_shift_and_window_size(input_dimensions)  # as its own forward does
        return self.why_table()

    def forward(self, x: Tensor, input_dimensions: tuple[int, int], *_: Any, **__: Any) -> Any:
        return self.apply(x, input_dimensions), None

    def apply(self, x: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        height, width = input_dimensions
        tokens = x.view(x.shape[0], height, width, x.shape[2])
        return swin_block(tokens, self.spec(), self.weights()).view(x.shape)

    def comparable(self, result: Any) -> Any:
        return result[0]  # beside it are attention weights, which nobody asked for


class MaskFormerSwinBlock(TransformersSwinBlock):
    """MaskFormerSwinLayer."""

    def linears(self, block: Any) -> tuple[nn.Linear, ...]:
        own = getattr(block.attention, "self")  # noqa: B009 -- a name that reads as a variable
        return (
            *(own.query, own.key, own.value),
            *(block.attention.output.dense, block.intermediate.dense, block.output.dense),
        )

    def activation(self, block: Any) -> nn.Module:
        return block.intermediate.intermediate_act_fn

    def table(self) -> Tensor:
        return self._own.relative_position_bias_table

    def index(self) -> Tensor:
        return self._own.relative_position_index

    def scale(self) -> float | None:
        return None

    def num_heads(self) -> int:
        return self._own.num_attention_heads

    @property
    def _own(self) -> Any:
        return getattr(self.module.attention, "self")  # noqa: B009 -- as above

    def why_not(  # type: ignore[override]  # of a layer with other arguments
        self, x: Tensor, input_dimensions: tuple[int, int], output_attentions: Any = False
    ) -> str | None:
        return "attention weights are asked for" if output_attentions else self.why_table()

    def forward(self, x: Tensor, input_dimensions: tuple[int, int], *_: Any) -> Any:
        return (self.apply(x, input_dimensions),)


class Merging(Fast):
    """Patch merging of timm and torchvision: [B, H, W, C] to [B, h, w, 2C]."""

    reads_settings = True

    def __init__(self, module: nn.Module, how: HowToRun) -> None:
        super().__init__(module, how)
        check_parts(module)
        if type(self.module.norm) is not nn.LayerNorm:
            raise Refused(f"its norm is a {type(self.module.norm).__name__}")
        if type(self.module.reduction) is not nn.Linear:
            raise Refused(f"its reduction is a {type(self.module.reduction).__name__}")

    def likeness(self) -> Hashable:
        return type(self).__name__, self.module.reduction.in_features

    def forward(self, x: Tensor) -> Tensor:
        return merge_patches(x, PatchMergingWeights.of(self.module))


class TransformersMerging(Merging):
    """Patch merging of transformers: [B, H * W, C] and (H, W) to [B, h * w, 2C]."""

    def forward(self, x: Tensor, input_dimensions: tuple[int, int]) -> Tensor:  # type: ignore[override]
        height, width = input_dimensions
        tokens = x.view(x.shape[0], height, width, x.shape[2])
        return super().forward(tokens).flatten(1, 2)


class TransformersSwin(TransformersRegion):
    """SwinBackbone and MaskFormerSwinBackbone."""

    reads_settings = True
    read_at_every_call = TransformersSwinBlock.read_at_every_call

    def __init__(self, module: nn.Module, how: HowToRun) -> None:
        super().__init__(module, how)
        check_parts(module)
        host: Any = module
        self._swin = host.swin if hasattr(host, "swin") else host.model
        self._normed_by_name = isinstance(host.hidden_states_norms, nn.ModuleDict)
        make = TransformersSwinBlock if self._normed_by_name else MaskFormerSwinBlock
        stages = self._swin.encoder.layers
        self._blocks = [[make(block, how) for block in stage.blocks] for stage in stages]
        embeddings = self._swin.embeddings
        projection = embeddings.patch_embeddings.projection
        if type(projection) is not nn.Conv2d or not cuts_patches(projection):
            raise Refused("its patch embedding is no convolution that cuts patches")
        norms = host.hidden_states_norms
        norms = list(norms.values() if self._normed_by_name else norms)
        if any(type(norm) is not nn.LayerNorm for norm in [embeddings.norm, *norms]):
            raise Refused("its norms are not layer norms")
        for stage in list(stages)[:-1]:
            Merging(stage.downsample, how)  # which refuses what it does not cover

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        problem = super().why_not(*args, **kwargs)
        if problem is not None:
            return problem
        attention = getattr(self.module.config, "_attn_implementation", "eager")
        if attention not in ("eager", "sdpa", None):
            return f"attn_implementation={attention!r} is the host's choice"
        embeddings = self._swin.embeddings
        if embeddings.position_embeddings is not None:
            return "it has absolute position embeddings"
        problems = (block.why_table() for stage in self._blocks for block in stage)
        return next((problem for problem in problems if problem is not None), None)

    def tensors(self, pixel_values: Tensor, **constants: Any) -> tuple[Tensor, ...]:
        names, wanted = list(self.module.stage_names), list(self.module.out_features)
        x = self._embed(pixel_values)
        maps = []
        for index, name in enumerate(names):
            if index > 0:
                x = swin_stage(x, self._stage(index - 1))
            if name in wanted and (index > 0 or self._normed_by_name):  # MaskFormer has no stem
                maps.append(self._map(x, name, index))
            if name == wanted[-1]:
                break
        return tuple(maps)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        embeddings = self._swin.embeddings
        projection, norm = embeddings.patch_embeddings.projection, embeddings.norm
        return patch_embed(
            pixel_values,
            projection.weight,
            projection.bias,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            ceil_mode=True,
        )

    def _stage(self, index: int) -> SwinStage:
        downsample = None
        if index > 0:
            downsample = PatchMergingWeights.of(self._swin.encoder.layers[index - 1].downsample)
        return SwinStage(
            downsample, [(block.spec(), block.weights) for block in self._blocks[index]]
        )

    def _map(self, x: Tensor, name: str, index: int) -> Tensor:
        norms = self.module.hidden_states_norms
        norm = norms[name] if self._normed_by_name else norms[index - 1]
        return layer_norm_nchw(x, norm.weight, norm.bias, eps=norm.eps)


_TRANSFORMERS, _TIMM = "transformers.models", "timm.models.swin_transformer"
_TORCHVISION = "torchvision.models.swin_transformer"
REPLACED: dict[str, type[Fast]] = {
    f"{_TRANSFORMERS}.swin.modeling_swin.SwinBackbone": TransformersSwin,
    f"{_TRANSFORMERS}.swin.modeling_swin.SwinLayer": TransformersSwinBlock,
    f"{_TRANSFORMERS}.swin.modeling_swin.SwinPatchMerging": TransformersMerging,
    f"{_TRANSFORMERS}.maskformer.modeling_maskformer_swin.MaskFormerSwinBackbone": TransformersSwin,
    f"{_TRANSFORMERS}.maskformer.modeling_maskformer_swin.MaskFormerSwinLayer": MaskFormerSwinBlock,
    f"{_TRANSFORMERS}.maskformer.modeling_maskformer_swin.MaskFormerSwinPatchMerging": (
        TransformersMerging
    ),
    f"{_TIMM}.SwinTransformerBlock": TimmSwinBlock,
    f"{_TIMM}.PatchMerging": Merging,
    f"{_TORCHVISION}.SwinTransformerBlock": TorchvisionSwinBlock,
    f"{_TORCHVISION}.PatchMerging": Merging,
}
