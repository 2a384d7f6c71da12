"""Matrix of host models: results and gradients equal upstream's with our forward inside."""

import pytest

pytest.importorskip("transformers")

import host_models_detection  # noqa: F401 -- registers hosts, as those below
import host_models_swin_v2  # noqa: F401
import host_models_transformers  # noqa: F401
import host_models_types  # noqa: F401
import host_models_vision  # noqa: F401
import host_models_vit  # noqa: F401
import timm
import torch
from host_matrix import HOSTS, check_gradients, check_results
from reference_models import images, randomize_

import fastbb


@pytest.mark.parametrize("host", HOSTS)
def test_results_equal_upstream(host: str) -> None:
    check_results(HOSTS[host])


@pytest.mark.parametrize("host", HOSTS)
def test_gradients_equal_upstream(host: str) -> None:
    check_gradients(HOSTS[host])


@torch.no_grad()
def test_a_model_without_batch_norms_is_left_as_it_is() -> None:
    model = randomize_(timm.create_model("test_mambaout"))
    pixels = images(64, 64)
    want = model(pixels)
    before = [set(vars(module)) for module in model.modules()]
    with pytest.warns(fastbb.AccelerateWarning, match="nothing in MambaOut is accelerated"):
        report = fastbb.accelerate(model, mode="eager")
    assert not report.replaced and not report.left_alone
    assert "no backbone that fastbb makes faster" in str(report)
    assert [set(vars(module)) for module in model.modules()] == before
    assert torch.equal(model(pixels), want)
