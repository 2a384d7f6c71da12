"""Tests of the loopback Hub with huggingface_hub and the libraries built on it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_api,
    hf_hub_download,
    hf_hub_url,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "microsoft/tiny-swin"
WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "onnx" / "deep").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "swin"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "onnx" / "deep" / "weights é.bin").write_bytes(b"onnx")
    return folder


def methods(hub: HubServer) -> list[str]:
    return [request.method for request in hub.requests]


def test_download_lands_in_the_tests_own_cache(hub: HubServer, folder: Path) -> None:
    commit = hub.add_repo(REPO, folder)
    path = Path(hf_hub_download(REPO, "model.safetensors"))
    assert path.read_bytes() == WEIGHTS
    assert path.is_relative_to(hub.cache_dir)
    assert path.parent.name == commit
    assert methods(hub) == ["HEAD", "GET"]


def test_second_download_is_one_head_that_matches_the_etag(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    first = hf_hub_download(REPO, "model.safetensors")
    hub.requests.clear()
    assert hf_hub_download(REPO, "model.safetensors") == first
    assert methods(hub) == ["HEAD"]


def test_new_commit_downloads_only_the_file_whose_etag_changed(
    hub: HubServer, folder: Path
) -> None:
    hub.add_repo(REPO, folder)
    old = hf_hub_download(REPO, "config.json")
    hf_hub_download(REPO, "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "resnet"}')
    hub.add_repo(REPO, folder)
    hub.requests.clear()
    new = Path(hf_hub_download(REPO, "config.json"))
    hf_hub_download(REPO, "model.safetensors")
    assert new.read_text() == '{"model_type": "resnet"}'
    assert Path(old).read_text() == '{"model_type": "swin"}'
    assert methods(hub) == ["HEAD", "GET", "HEAD"]


def test_metadata_has_size_etag_and_commit(hub: HubServer, folder: Path) -> None:
    commit = hub.add_repo(REPO, folder)
    metadata = get_hf_file_metadata(hf_hub_url(REPO, "model.safetensors"))
    assert (metadata.size, metadata.commit_hash) == (len(WEIGHTS), commit)
    assert metadata.etag is not None and len(metadata.etag) == 40


def test_cut_download_resumes_with_a_range_request(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add_repo(REPO, folder)
    hub.cut_next_download(5000)
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    assert [(r.range, r.status) for r in hub.requests if r.method == "GET"] == [
        (None, 200),
        ("bytes=5000-", 206),
    ]


@pytest.mark.parametrize(
    ("asked", "status", "content_range"),
    [
        ("bytes=10-19", 206, "bytes 10-19/16384"),
        ("bytes=16000-99999", 206, "bytes 16000-16383/16384"),
        ("bytes=16384-", 416, "bytes */16384"),
    ],
    ids=["inside", "past-the-end", "outside"],
)
def test_range_requests_get_partial_content(
    hub: HubServer, folder: Path, asked: str, status: int, content_range: str
) -> None:
    hub.add_repo(REPO, folder)
    response = get_session().get(hf_hub_url(REPO, "model.safetensors"), headers={"Range": asked})
    assert (response.status_code, response.headers["Content-Range"]) == (status, content_range)
    if status == 206:
        start = int(asked[6:].split("-")[0])
        assert response.content == WEIGHTS[start : start + len(response.content)]


def test_model_info_and_file_lists_name_the_files(hub: HubServer, folder: Path) -> None:
    commit = hub.add_repo(REPO, folder)
    names = ["config.json", "model.safetensors", "onnx/deep/weights é.bin"]
    info = model_info(REPO)
    assert (info.id, info.sha) == (REPO, commit)
    assert [sibling.rfilename for sibling in info.siblings or []] == names
    api = HfApi()
    assert sorted(api.list_repo_files(REPO)) == names
    assert {entry.path for entry in api.list_repo_tree(REPO)} == {*names[:2], "onnx"}
    assert [entry.path for entry in api.list_repo_tree(REPO, "onnx")] == ["onnx/deep"]
    assert api.repo_exists(REPO) and not api.repo_exists("microsoft/no-such-model")
    assert api.file_exists(REPO, names[2]) and not api.file_exists(REPO, "missing.json")


def test_endpoint_argument_reaches_the_server(hub: HubServer, folder: Path) -> None:
    hub.add_repo("plain-name", folder)
    assert HfApi(endpoint=hub.endpoint).model_info("plain-name").id == "plain-name"


def test_snapshot_download_mirrors_the_folder(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    snapshot = Path(snapshot_download(REPO))
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert sorted(p.relative_to(snapshot) for p in snapshot.rglob("*") if p.is_file()) == names
    assert all((snapshot / n).read_bytes() == (folder / n).read_bytes() for n in names)


def test_each_revision_has_its_own_files(hub: HubServer, folder: Path) -> None:
    main = hub.add_repo(REPO, folder)
    (folder / "config.json").write_text("{}")
    pr = hub.add_repo(REPO, folder, revision="refs/pr/1")
    assert Path(hf_hub_download(REPO, "config.json")).parent.name == main
    assert Path(hf_hub_download(REPO, "config.json", revision="refs/pr/1")).read_text() == "{}"
    assert Path(hf_hub_download(REPO, "config.json", revision=main)).parent.name == main
    assert model_info(REPO, revision="refs/pr/1").sha == pr
    branches = {ref.name: ref.target_commit for ref in HfApi().list_repo_refs(REPO).branches}
    assert branches == {"main": main, "refs/pr/1": pr}


def test_missing_repository_revision_and_file_are_told_apart(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("microsoft/no-such-model", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        model_info("microsoft/no-such-model")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "preprocessor_config.json")
    assert list((hub.cache_dir / "models--microsoft--tiny-swin" / ".no_exist").rglob("*.json"))


def test_gated_repository_wants_its_token(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, folder, token="hf_right")
    with pytest.raises(GatedRepoError) as without:
        hf_hub_download(REPO, "config.json")
    with pytest.raises(GatedRepoError) as wrong:
        hf_hub_download(REPO, "config.json", token="hf_wrong")
    assert (without.value.response.status_code, wrong.value.response.status_code) == (401, 403)
    assert Path(hf_hub_download(REPO, "config.json", token="hf_right")).is_file()
    assert [request.token for request in hub.requests] == [None, "hf_wrong", "hf_right", "hf_right"]


def test_local_files_only_never_asks_the_server(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    path = hf_hub_download(REPO, "config.json")
    hub.requests.clear()
    assert hf_hub_download(REPO, "config.json", local_files_only=True) == path
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "model.safetensors", local_files_only=True)
    assert hub.requests == []


def test_offline_serves_the_cache_and_comes_back(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    path = hf_hub_download(REPO, "config.json")
    with hub.offline():
        assert hf_hub_download(REPO, "config.json") == path
        with pytest.raises(LocalEntryNotFoundError, match="check your connection"):
            hf_hub_download(REPO, "model.safetensors")
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS


def test_subprocess_uses_the_same_server_and_cache(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, folder)
    code = f"import huggingface_hub as h; print(h.hf_hub_download({REPO!r}, 'config.json'))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert Path(run.stdout.strip()).is_relative_to(hub.cache_dir)
    hub.offline()
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    again = subprocess.run(
        command, env=offline, capture_output=True, text=True, check=True, timeout=60
    )
    assert again.stdout == run.stdout


@pytest.mark.parametrize("turn", [1, 2])
def test_transformers_follows_every_new_server(hub: HubServer, folder: Path, turn: int) -> None:
    transformers = pytest.importorskip("transformers")
    hub.add_repo(REPO, folder)
    assert transformers.AutoConfig.from_pretrained(REPO).model_type == "swin"
    assert f"/api/models/{REPO}" in {request.path for request in hub.requests}
    assert Path(transformers.utils.cached_file(REPO, "config.json")).is_relative_to(hub.cache_dir)


def test_timm_downloads_from_the_server(hub: HubServer, folder: Path) -> None:
    from timm.models import load_model_config_from_hf

    (folder / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
    hub.add_repo(REPO, folder)
    assert load_model_config_from_hf(REPO)[1] == "resnet18"
    assert methods(hub) == ["HEAD", "GET"]


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    def redirections():
        environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        return dict(vars(constants)), hf_api.api.endpoint, environment

    before = redirections()
    yield
    assert redirections() == before


def test_everything_is_restored_afterwards(nothing_left_behind: None, hub: HubServer) -> None:
    assert constants.ENDPOINT == hf_api.api.endpoint == os.environ["HF_ENDPOINT"] == hub.endpoint
