"""Several commands do the shards of one directory, each its share (`--shard-index i/n`)."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fastbb.cli import main
from fastbb.extraction import (
    OutputError,
    OutputLockedError,
    Report,
    extract,
    open_features,
    verify_features,
)
from fastbb.extraction.layout import read_events
from fastbb.extraction.locks import DirectoryLock
from fastbb.extraction.store import FeatureWriter

Tree = Callable[[Path], dict[str, bytes]]
PAUSE_S = 60


def features_of(tree: Tree, directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(directory).items() if not name.startswith("run-")}


def test_shares_give_the_bytes_of_one_command(
    run: Callable[..., Report], tmp_path: Path, tree: Tree
) -> None:
    run(tmp_path / "whole")
    first = run(shard_index="0/2")  # shards 0 and 2 of 3
    assert (first.rows, first.tried, first.elsewhere) == (6, 6, 4)
    assert "4 images left to other processes" in repr(first)
    assert not (tmp_path / "out" / "manifest.json").exists()
    last = run(shard_index="1/2")
    assert (last.rows, last.tried, last.elsewhere, last.errors) == (
        *(10, 4, 0),
        {"unsupported_format": 1},
    )
    assert features_of(tree, tmp_path / "out") == tree(tmp_path / "whole")
    assert verify_features(tmp_path / "out").passed
    logs = sorted(path.name for path in (tmp_path / "out").glob("run*"))
    assert logs == ["run-0-of-2.jsonl", "run-1-of-2.jsonl"]
    done = [event["shard"] for event in read_events(tmp_path / "out") if event["event"] == "shard"]
    assert done == [0, 2, 1]
    assert "images/s" in open_features(tmp_path / "out").describe()


def test_new_images_are_shared_too(
    run: Callable[..., Report], images: Path, tmp_path: Path, tree: Tree
) -> None:
    names = [f"zz{i}.png" for i in range(6)]
    for out, shares in ((tmp_path / "whole", [None]), (tmp_path / "out", ["0/2", "1/2"])):
        for share in shares:
            run(out, shard_index=share)
        for name in names:
            (images / name).write_bytes((images / "00001.png").read_bytes())
        reports = [run(out, shard_index=share, update=True) for share in shares]
        assert (reports[-1].rows, reports[-1].new, reports[-1].elsewhere) == (16, 0, 0)
        for name in names:
            (images / name).unlink()
    assert features_of(tree, tmp_path / "out") == tree(tmp_path / "whole")


def test_a_share_resumes_after_a_kill(
    run: Callable[..., Report], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    append, commit = FeatureWriter.append, FeatureWriter.commit

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for method in (append, commit):  # after the plan, and after the list of images
        with monkeypatch.context() as patch:
            patch.setattr(FeatureWriter, method.__name__, killed)
            with pytest.raises(KeyboardInterrupt):
                run(shard_index="1/2")
    assert run(shard_index="1/2").tried == 4 and run(shard_index="0/2").tried == 6
    assert features_of(tree, tmp_path / "out") == tree(tmp_path / "whole")


def test_shares_may_have_workers(run: Callable[..., Report], tmp_path: Path, tree: Tree) -> None:
    run(tmp_path / "whole")
    threads = open_features(tmp_path / "whole").plan["threads"]
    for share in ("0/2", "1/2"):
        assert run(shard_index=share, workers=1).tried
    if threads == open_features(tmp_path / "out").plan["threads"]:
        assert features_of(tree, tmp_path / "out") == tree(tmp_path / "whole")


# locks


def test_the_same_share_twice_is_refused(
    run: Callable[..., Report], model: Path, images: Path, tmp_path: Path
) -> None:
    run(shard_index="1/3")
    out = tmp_path / "out"
    with FeatureWriter(out, (0, 3)):
        for share in ("0/3", "0/2", "0/4"):
            with pytest.raises(OutputLockedError, match=f"the share {share} or shares of another"):
                run(shard_index=share)
        arguments = ["extract", str(images), "--out", str(out), "--shard-index", "0/3"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 5 and "give each process another --shard-index" in result.output
        with pytest.raises(OutputLockedError, match="another process is writing to"):
            run()  # all shards
        assert run(shard_index="2/3").tried == 2  # of nobody
    assert run(shard_index="0/3").tried == 4


def test_a_share_is_refused_while_a_command_has_all(
    run: Callable[..., Report], tmp_path: Path
) -> None:
    run()
    with FeatureWriter(tmp_path / "out"), pytest.raises(OutputLockedError, match="another process"):
        run(shard_index="0/2")


def test_who_comes_second_waits_for_the_plan(
    run: Callable[..., Report], tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole")
    reports: list[Report] = []
    second = threading.Thread(target=lambda: reports.append(run(shard_index="1/2")))
    with FeatureWriter(tmp_path / "out", (0, 2)) as first, first.planning():
        second.start()
        deadline = time.monotonic() + PAUSE_S
        while "waiting for the plan" not in (said := capsys.readouterr().err):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        assert not (tmp_path / "out" / "plan.json").exists()
        whole = FeatureWriter(tmp_path / "whole")
        whole.read()
        first.start({k: v for k, v in whole.plan.items() if k != "format"})
        first.append("start", whole.frozen(), inputs=whole.generations[0].inputs)
    second.join(PAUSE_S)
    assert [(report.tried, report.elsewhere) for report in reports] == [(4, 6)]
    assert run(shard_index="0/2").ok == 9
    assert features_of(tree, tmp_path / "out") == tree(tmp_path / "whole")


def test_locks_exclude_each_other(tmp_path: Path) -> None:
    a, b = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    assert a.take_share(7, 9) and a.take_share(7, 9) and not b.take_share(7, 9)
    assert b.take_share(8, 9) and not a.take_all()
    a.take_plan(lambda: None)
    assert b.take_share(0, 9)  # no share has the place of the plan
    for n in (1, 8, 10, 2**31 - 1):
        other = DirectoryLock(tmp_path)
        assert not other.take_share(0, n) and not other.take_share(n - 1, n)
        other.close()
    b.close()
    assert a.take_all()
    c = DirectoryLock(tmp_path)
    assert not c.take_share(0, 1) and not c.take_share(2**31 - 2, 2**31 - 1)
    a.close()
    assert c.take_all()
    c.close()


def test_a_share_removes_what_a_killed_one_left_of_its_shards(
    run: Callable[..., Report], tmp_path: Path
) -> None:
    run(shard_index="0/2")
    names = "shards/features-00000.safetensors", "shards/commit-00002.json", "plan.json"
    names += "rows/rows-00000.jsonl", "rows/generation-00001.json", "manifest.json"
    mine = [tmp_path / "out" / f"{name}.tmp-77" for name in names]
    other = tmp_path / "out" / "shards" / "index-00001.jsonl.tmp-77"
    for path in (*mine, other):
        path.write_bytes(b"")
    assert run(shard_index="0/2").tried == 0 and other.exists()  # it may be written now
    assert not any(path.exists() for path in mine)
    extract(None, [tmp_path / "images"], tmp_path / "out")
    assert not other.exists()


def test_a_plan_is_never_replaced(
    run: Callable[..., Report], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    start = FeatureWriter.start

    def late(writer: FeatureWriter, plan: Any) -> None:
        monkeypatch.setattr(FeatureWriter, "start", start)
        run(out, shard_index="1/2", batch_size=2)  # a machine whose plan this one does not see yet
        start(writer, plan)

    monkeypatch.setattr(FeatureWriter, "start", late)
    monkeypatch.setattr(DirectoryLock, "take_plan", lambda *_: None)
    with pytest.raises(OutputLockedError, match="another process has started"):
        run(out, shard_index="0/2", batch_size=4)
    assert open_features(out).plan["batch_size"] == 2
    assert not list(out.glob("plan.json.tmp*"))
    assert run(out, shard_index="0/2").ok == 9


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(
    code: int, run: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(DirectoryLock, "_call", refused)
    with pytest.raises(OutputError, match=r"; give one on a file system with locks"):
        run(shard_index="0/2")
