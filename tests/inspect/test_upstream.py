"""Reference model of `verify`: the family's upstream, or our own if its library is missing."""

import sys
from dataclasses import replace

import pytest
import torch
from reference_models import hf_pair, hf_resnet, hf_swin, images

from fastbb.backbone.registry import family_of
from fastbb.inspect import upstream as upstream_module
from fastbb.inspect.verify import verify

pytest.importorskip("transformers")


def test_verify_without_transformers_uses_our_own_reference_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for pair in (hf_pair(hf_swin(image_size=64)), hf_pair(hf_resnet())):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "transformers", None)
            report = verify(pair.ours, inputs=images(64, 64))
            assert report.passed and report.reference == "fastbb's own plain PyTorch"
            (note,) = report.notes
            assert note.startswith("the reference is our own: ModuleNotFoundError")
            assert f"note: {note}" in str(report)
            with torch.no_grad():
                first = next(p for p in pair.upstream.parameters() if p.is_floating_point())
                first.mul_(1.001)
            assert not verify(pair.ours, pair.upstream, images(64, 64)).passed


def test_family_without_upstream_raises_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = hf_pair(hf_resnet())
    family, config = family_of("resnet")
    unlisted = replace(family, upstream=None)
    monkeypatch.setattr(upstream_module, "family_of", lambda model_type: (unlisted, config))
    with pytest.raises(ValueError, match=r"its family names no upstream model \(Family.upstream\)"):
        verify(pair.ours)
    assert verify(pair.ours, pair.upstream, images(64, 64)).passed
