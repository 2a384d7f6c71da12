"""A Hub that refuses connections, is broken or is slow: one request, an error within seconds."""

import subprocess
import sys
import time
from http import HTTPStatus

import pytest
from hub_server import HubServer, _Handler
from huggingface_hub import constants

import fastbb.backbone.hub
from fastbb import AutoBackbone, AutoConfig, AutoImageProcessor, ResNetBackbone, ResNetConfig
from fastbb.backbone.hub import find_file
from fastbb.extraction import FeatureExtractor

REPO = "acme/tiny"
LOADERS = {
    "backbone": AutoBackbone.from_pretrained,
    "config": AutoConfig.from_pretrained,
    "processor": AutoImageProcessor.from_pretrained,
    "extractor": FeatureExtractor,
}


@pytest.fixture
def folder(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
    ResNetBackbone(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["acme/mistyped", "resnet5O"])
def test_a_broken_hub_is_asked_once(
    loader: str, name: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = HTTPStatus.SERVICE_UNAVAILABLE, {}, b""
    monkeypatch.setattr(_Handler, "_answer", lambda *_: answer)
    with pytest.raises(OSError, match=rf"{name}.*the Hub cannot be reached \(it answers 503\)"):
        LOADERS[loader](name)
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_a_slow_hub_is_waited_for_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = []

    def answer_late(handler, path, query, token):
        questions.append(path)
        time.sleep(1)
        return HTTPStatus.NOT_FOUND, {}, b""

    monkeypatch.setattr(_Handler, "_answer", answer_late)
    monkeypatch.setattr(fastbb.backbone.hub, "ANSWER_TIMEOUT_S", 0.2)
    with pytest.raises(OSError, match=r"no answer within 0\.2 s; HF_HUB_ETAG_TIMEOUT=60 waits"):
        AutoBackbone.from_pretrained("acme/mistyped")
    assert len(questions) == 1


def test_the_timeout_of_the_user_is_kept(
    hub: HubServer, folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(REPO, folder)
    monkeypatch.setattr(fastbb.backbone.hub, "ANSWER_TIMEOUT_S", 1e-6)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 30)
    assert AutoBackbone.from_pretrained(REPO).channels == [32]


def test_without_network_a_mistyped_name_takes_less_than_five_seconds(hub: HubServer) -> None:
    # in a new process, since the fixture removes the waits between retries
    program = (
        "import time, fastbb\n"
        "start = time.perf_counter()\n"
        "try: fastbb.AutoBackbone.from_pretrained('acme/mistyped')\n"
        "except OSError as error: print(time.perf_counter() - start, error)\n"
    )
    with hub.offline():
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    seconds, _, message = run.stdout.partition(" ")
    assert float(seconds) < 5, run.stderr
    assert "'acme/mistyped' is neither" in message and "the Hub cannot be reached (" in message


def test_a_known_repository_is_served_from_the_cache(hub: HubServer, folder) -> None:
    hub.add_repo(REPO, folder)
    AutoBackbone.from_pretrained(REPO)
    with hub.offline():
        assert AutoBackbone.from_pretrained(REPO).channels == [32]
        assert find_file(REPO, "preprocessor_config.json") is None


def test_a_cached_file_costs_one_request(hub: HubServer, folder) -> None:
    hub.add_repo(REPO, folder)
    find_file(REPO, "config.json")
    assert [request.method for request in hub.requests] == ["HEAD", "HEAD", "GET"]
    hub.requests.clear()
    find_file(REPO, "config.json")
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_a_broken_download_resumes(hub: HubServer, folder) -> None:
    hub.add_repo(REPO, folder)
    find_file(REPO, "config.json")
    hub.requests.clear()
    hub.cut_next_download(1000)
    assert find_file(REPO, "model.safetensors")
    downloads = [request for request in hub.requests if request.method == "GET"]
    assert len(downloads) == 2
    assert AutoBackbone.from_pretrained(REPO).channels == [32]


def test_a_request_that_fails_once_before_a_download_is_repeated(
    hub: HubServer, folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(REPO, folder)
    answers = iter([True, False])  # the Hub has the file, then breaks for a moment
    answer = _Handler._answer

    def sometimes(handler, path, query, token):
        if next(answers, True):
            return answer(handler, path, query, token)
        return HTTPStatus.SERVICE_UNAVAILABLE, {}, b""

    monkeypatch.setattr(_Handler, "_answer", sometimes)
    assert find_file(REPO, "config.json")
