"""Swin Transformer V2 (Liu et al. 2022) with the semantics of transformers; timm's is read too.

Upstream: transformers `models/swinv2/`, timm `models/swin_transformer_v2.py`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastbb_kernels import WindowGeometry

from ..backbone.checkpoint import StateDict
from .parts import CalledModules, kept_parts
from .stage_norms import StageNorms
from .swin_config import Swinv2Config, as_pair
from .swin_forward import call_embeddings
from .swin_modules import (
    SwinEmbeddings,
    SwinEncoder,
    SwinPatchEmbeddings,
    SwinStage,
    read_swin,
)
from .swin_parts import SwinBlockSpec, SwinParts
from .swin_v2_forward import swinv2_maps
from .swin_v2_modules import Swinv2Layer, Swinv2PatchMerging
from .swin_v2_parts import TRANSFORMERS_MASK_VALUE


class Swinv2Backbone(StageNorms):
    """Swin V2 with transformers' parameter names. Calls may have images of different sizes.

    Stages: "stem" (the patch embedding), "stage1", ... Channels C, C, 2C, 4C, 8C; strides 4, 4, 8,
    16, 32 for patches of 4. No returned map has a norm. Windows are those of the configuration's
    `image_size`, for images of all sizes.
    """

    config_class = Swinv2Config
    config: Swinv2Config
    optional_weights = ("layernorm.*",)
    unused_weights = (
        *("*relative_position_index", "*.relative_coords_table"),
        *("*.attn_mask", "*.mask_token"),
    )
    final_norm_name = "layernorm"
    has_tokens = True

    def __init__(self, config: Swinv2Config) -> None:
        super().__init__(config)
        config = self.config  # converted to ours if it was transformers'
        self.stage_names = list(config.stage_names or ())
        self.num_features = [config.embed_dim] + [
            config.stage_channels(stage) for stage in range(len(config.depths))
        ]
        patch = as_pair(config.patch_size)
        self.embeddings = SwinEmbeddings(
            SwinPatchEmbeddings(config.num_channels, config.embed_dim, patch, "pad"),
            config.embed_dim,
            n_positions=None,
            dropout=config.hidden_dropout_prob,
        )
        self.encoder = SwinEncoder(_stages(config))
        # no feature map is computed with it, but the image embedding is
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.hidden_states_norms = nn.ModuleDict()
        self._init_weights()

    def forward_stages(
        self,
        pixel_values: Tensor,
        wanted: Sequence[str],
        attentions: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if not wanted:
            return {}
        indices = [self.stage_names.index(name) for name in wanted]
        options: dict[str, Any] = {"attentions": attentions, "run_block": self.block_runner()}
        parts, _ = kept_parts(self, self._parts)
        if parts is None:
            x = call_embeddings(self.embeddings, pixel_values, False)
            maps = [x.permute(0, 3, 1, 2) for x in self.encoder(x, indices, **options)]
        else:
            maps = swinv2_maps(parts, pixel_values, indices, **options)
        return dict(zip(wanted, maps))

    def _hidden_states(
        self, stages: dict[str, Tensor], selected: bool | Sequence[int]
    ) -> tuple[Tensor | None, ...]:
        # tokens [B, h * w, C], as transformers' are
        states = super()._hidden_states(stages, selected)
        return tuple(None if x is None else x.flatten(2).transpose(1, 2) for x in states)

    def _parts(self, called: CalledModules) -> SwinParts:
        """All layers except those that have to be called."""
        layers = self.embeddings, self.encoder
        return read_swin(*layers, called, Swinv2Layer, Swinv2PatchMerging)

    def called_modules(self) -> dict[str, str]:
        return kept_parts(self, self._parts)[1].by_name(self)

    def to_checkpoint_names(self) -> StateDict:
        # transformers' whole models have the final norm, its backbones have not
        state, final = self.state_dict(), f"{self.final_norm_name}."
        if not self.lacks_final_norm:
            return state
        return {name: tensor for name, tensor in state.items() if not name.startswith(final)}

    def final_state(self, hidden_state: Tensor) -> Tensor:
        return self._normed(hidden_state, self.layernorm)


def _stages(config: Swinv2Config) -> list[SwinStage]:
    rows = as_pair(config.image_size)[0] // as_pair(config.patch_size)[0]
    n_blocks, done = sum(config.depths), 0
    stages = []
    for index, depth in enumerate(config.depths):
        channels = config.stage_channels(index)
        # transformers takes the rows for both axes
        resolution = rows // 2**index
        window = min(resolution, config.window_size)
        shift = 0 if resolution <= window else config.window_size // 2
        blocks = []
        for block in range(depth):
            shifts = (shift, shift) if block % 2 else (0, 0)
            spec = SwinBlockSpec(
                num_heads=config.num_heads[index],
                geometry=WindowGeometry((window, window), shifts),
                activation=config.hidden_act,
                drop_path=config.drop_path_rate * (done + block) / max(n_blocks - 1, 1),
                dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
                mask_value=TRANSFORMERS_MASK_VALUE,
                post_norm=True,
            )
            pretrained = config.pretrained_window_sizes[index]
            sizes = channels, int(config.mlp_ratio * channels), config.layer_norm_eps
            blocks.append(Swinv2Layer(*sizes, config.qkv_bias, spec, (pretrained, pretrained)))
        done += depth
        is_last = index == len(config.depths) - 1
        stages.append(SwinStage(blocks, None if is_last else Swinv2PatchMerging(channels)))
    return stages
