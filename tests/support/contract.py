"""Contract of native families: tests against the library that the weights come from.

The test file of a family has a class with its tiny upstream models:

    class TestContract(BackboneContract):
        UPSTREAM = {"swin": hf_swin}
        PAIRS = {"hf": lambda: family_pair("swin", "w7", "hf")}
"""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from reference_models import Pair, from_hf, images
from tolerance import assert_as_accurate_as_eager, assert_equals_upstream
from torch import nn

# of which the layers of a backbone are
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)


class BackboneContract:
    """Tests of a native family.

    Attributes:
        UPSTREAM: builders of tiny upstream models. A builder takes `out_indices=`, all stages by
            default; its model is transformers', or like it: `stage_names`, `save_pretrained`,
            `output_hidden_states=`, a result with `feature_maps` and `hidden_states`.
        PAIRS: builders of a `Pair`, by the library of the weights.
    """

    UPSTREAM: ClassVar[dict[str, Callable[..., Any]]]
    PAIRS: ClassVar[dict[str, Callable[[], Pair]]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for argument, values in (("upstream_of", self.UPSTREAM), ("pair_of", self.PAIRS)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values.values(), ids=list(values))

    def test_no_stage_selected_gives_no_maps(self, upstream_of: Any) -> None:
        assert from_hf(upstream_of(), out_indices=[])(images(32, 32)).feature_maps == ()

    @torch.no_grad()
    def test_hidden_states_are_the_stages_before_any_norm(self, upstream_of: Any) -> None:
        upstream, pixels = upstream_of(out_indices=[1]), images(60, 44)
        theirs = upstream(pixels, output_hidden_states=True)
        out = from_hf(upstream)(pixels, output_hidden_states=True)
        assert len(out.hidden_states) == len(upstream.stage_names)
        assert_equals_upstream(out.hidden_states, theirs.hidden_states)
        assert_equals_upstream(out.feature_maps, theirs.feature_maps)

    @torch.no_grad()
    def test_hidden_states_can_be_selected(self, upstream_of: Any) -> None:
        upstream, pixels = upstream_of(), images(32, 32)
        theirs = upstream(pixels, output_hidden_states=[1, -1]).hidden_states
        ours = from_hf(upstream)(pixels, output_hidden_states=[1, -1]).hidden_states
        if all(h is not None for h in theirs):
            pytest.skip("this transformers gives all of them")
        assert [h is None for h in ours] == [h is None for h in theirs]
        assert_equals_upstream([ours[1], ours[-1]], [theirs[1], theirs[-1]])

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_low_precision_loses_no_more_than_eager_upstream(
        self, upstream_of: Any, dtype: torch.dtype
    ) -> None:
        upstream, pixels = upstream_of(), images(60, 44)
        ours = from_hf(upstream, dtype=dtype)
        assert ours.dtype == dtype
        exact = copy.deepcopy(upstream).double()(pixels.double()).feature_maps
        eager = upstream.to(dtype)(pixels.to(dtype)).feature_maps
        got = ours(pixels.to(dtype)).feature_maps
        for stage, *maps in zip(ours.out_features, got, eager, exact):
            assert_as_accurate_as_eager(stage, *maps)

    @torch.no_grad()
    def test_autocast_gives_upstreams_dtype_and_accuracy(self, upstream_of: Any) -> None:
        upstream, pixels = upstream_of(), images(60, 44)
        ours = from_hf(upstream)
        exact = copy.deepcopy(upstream).double()(pixels.double()).feature_maps
        with torch.autocast("cpu", torch.bfloat16):
            eager, got = upstream(pixels).feature_maps, ours(pixels).feature_maps
        assert [m.dtype for m in got] == [m.dtype for m in eager]
        for stage, ours_, theirs, truth in zip(ours.out_features, got, eager, exact):
            # a norm may return fp32, but the products before it are bf16
            assert_as_accurate_as_eager(stage, ours_.bfloat16(), theirs.bfloat16(), truth)

    @torch.no_grad()
    def test_views_channels_last_and_empty_batches_equal_upstream(
        self, pair_of: Callable[[], Pair]
    ) -> None:
        pair = pair_of()
        view = images(64, 131)[..., 1:97:2].transpose(2, 3)  # odd offset, strided, H and W swapped
        assert not view.is_contiguous()
        want = pair.maps(view.contiguous())
        assert_equals_upstream(pair.ours(view).feature_maps, want)
        channels_last = view.contiguous(memory_format=torch.channels_last)
        assert_equals_upstream(pair.ours(channels_last).feature_maps, want)
        empty = pair.ours(view[:0]).feature_maps
        assert [m.shape for m in empty] == [(0, *m.shape[1:]) for m in want]

    @torch.no_grad()
    def test_hooks_of_layers_change_maps_as_upstreams(self, upstream_of: Any) -> None:
        upstream, pixels = upstream_of(), images(60, 44)
        ours = from_hf(upstream)
        theirs, found = dict(upstream.named_modules()), dict(ours.named_modules())
        layers = [n for n, m in found.items() if n in theirs and isinstance(m, LAYERS)]
        assert layers
        for model in (theirs, found):
            for scale, name in enumerate(layers, start=1):
                model[name].register_forward_hook(
                    lambda layer, inputs, y, scale=scale: y * (1 + 0.1 * (scale % 5))
                )
        want = upstream(pixels).feature_maps
        assert_equals_upstream(ours(pixels).feature_maps, want)
        assert ours.called_modules()
