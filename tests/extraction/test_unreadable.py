"""Directories that cannot be read, or that vanish before they are read."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fastbb.cli import main
from fastbb.extraction import InputError, extract, open_features
from fastbb.extraction import listing as module
from fastbb.extraction.listing import Listing

SCANDIR = os.scandir
DENIED = {"a/locked": errno.EACCES, "gone": errno.ENOENT}


class Entry:
    """Directory entry whose file system does not report its type."""

    def __init__(self, entry: os.DirEntry[str], number: int) -> None:
        self.name, self.path, self.number = entry.name, entry.path, number

    def is_dir(self, follow_symlinks: bool = True) -> bool:
        raise OSError(self.number, os.strerror(self.number), self.path)


@pytest.fixture
def deny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """deny(root, listing, stat): errors of listing directories and of stat of entries, by name."""

    def deny(root: Path, lists: dict[str, int], looks: dict[str, int] | None = None) -> None:
        def failing(path: Any) -> Any:
            name = os.path.relpath(path, root)
            if name.startswith(".."):
                return SCANDIR(path)
            if name in lists:
                raise OSError(lists[name], os.strerror(lists[name]), str(path))
            entries: list[Any] = list(SCANDIR(path))
            numbers = [(looks or {}).get(os.path.relpath(e.path, root)) for e in entries]
            return [e if n is None else Entry(e, n) for e, n in zip(entries, numbers)]

        monkeypatch.setattr(module.os, "scandir", failing)

    return deny


@pytest.fixture
def root(make_images: Callable[..., Path]) -> Path:
    root = make_images(1)
    for name in ("a/locked", "a/open", "gone", "z"):
        (root / name).mkdir(parents=True)
        (root / name / "x.png").write_bytes((root / "00000.png").read_bytes())
    return root


@pytest.mark.parametrize("pattern", ["", "/**/*.png"], ids=["directory", "glob"])
def test_a_directory_that_cannot_be_read_is_named_and_the_others_are_listed(
    root: Path, deny: Callable[..., None], pattern: str
) -> None:
    deny(root, DENIED)
    listing = Listing([f"{root}{pattern}"])
    assert [source.id for source in listing] == ["00000.png", "a/open/x.png", "z/x.png"]
    assert listing.skipped == {"unreadable directories": 2}
    assert listing.unreadable == [
        f"'{root}/a/locked': permission denied",
        f"'{root}/gone': no such file or directory",
    ]


def test_an_entry_without_permission_is_named_if_it_matches(
    root: Path, deny: Callable[..., None]
) -> None:
    (root / ".hidden").mkdir()
    deny(root, {}, dict.fromkeys(("gone", "a/open/x.png", ".hidden"), errno.EIO))
    for pattern, ids, names in (
        ("", ["00000.png", "a/locked/x.png", "z/x.png"], ["gone", "a/open/x.png"]),
        ("/*/x.png", ["z/x.png"], ["gone"]),
        ("/*.png", ["00000.png"], []),
    ):
        listing = Listing([f"{root}{pattern}"])
        assert [source.id for source in listing] == ids
        assert listing.unreadable == [f"'{root}/{name}': input/output error" for name in names]


@pytest.mark.parametrize(
    ("name", "pattern"), [(".", ""), (".", "/*.png"), ("a/locked", "/a/locked/*.png")]
)
def test_an_input_without_a_readable_directory_is_an_error(
    root: Path, deny: Callable[..., None], model: Path, tmp_path: Path, name: str, pattern: str
) -> None:
    deny(root, {name: errno.EACCES})
    path = os.path.normpath(root / name)
    wanted = f"no images found; cannot list '{path}': permission denied$"
    with pytest.raises(InputError, match=wanted):
        extract(model, [root / "z", f"{root}{pattern}"], tmp_path / "out")
    result = CliRunner().invoke(
        main, ["extract", f"{root}{pattern}", "--out", str(tmp_path / "out"), "--model", str(model)]
    )
    assert result.exit_code == 2 and f"cannot list '{path}': permission denied" in result.stderr
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize("name", ["closed/a.jpg", "closed/images", "closed/*/a.jpg", "closed/b/*"])
def test_a_path_below_a_directory_without_permission_is_denied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    look, closed = os.stat, tmp_path / "closed"
    closed.mkdir()

    def denying(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **options)

    def nothing(path: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(module.os, "stat", denying)
    monkeypatch.setattr(module.os, "scandir", nothing)
    with pytest.raises(InputError, match="permission denied"):
        list(Listing([tmp_path / name]))
    assert stat.S_ISDIR(look(closed).st_mode)


def test_unreadable_directories_are_reported_and_exit_with_1(
    root: Path, deny: Callable[..., None], model: Path, tmp_path: Path
) -> None:
    deny(root, DENIED)
    arguments = ["extract", str(root), "--out", str(tmp_path / "out"), "--model", str(model)]
    result = CliRunner().invoke(main, arguments)
    named = f"'{root}/a/locked': permission denied, '{root}/gone': no such file or directory"
    assert result.exit_code == 1
    assert "3 images\npassed over: 2 unreadable directories\n" in result.stderr
    assert f"cannot list {named}\n" in result.stderr
    assert "3 of 3 images have features" in result.stdout
    assert result.stdout.endswith(f"; 2 directories were not read: {named}\n")
    assert f"not read  2 directories: {named}" in open_features(tmp_path / "out").describe()


def test_a_resumed_run_keeps_the_list_and_reports_unreadable_directories(
    root: Path, deny: Callable[..., None], model: Path, tmp_path: Path
) -> None:
    deny(root, DENIED)
    first = extract(model, root, tmp_path / "out")
    deny(root, {})
    again = extract(model, root, tmp_path / "out")
    assert again.resumed_rows == again.rows == 3 and not again.errors
    assert len(first.unreadable_directories) == 2 and not again.unreadable_directories
    assert again.new == 2 and len(open_features(tmp_path / "out").all_ids) == 3
    assert extract(model, root, tmp_path / "other").unreadable_directories == ()
    assert "unreadable_directories" not in open_features(tmp_path / "other").plan


def test_only_the_first_of_many_directories_are_shown(
    root: Path, deny: Callable[..., None], model: Path, tmp_path: Path
) -> None:
    names = [f"d{i}" for i in range(9)]
    for name in names:
        (root / name).mkdir()
    deny(root, dict.fromkeys(names, errno.EACCES))
    report = extract(model, root, tmp_path / "out")
    assert len(report.unreadable_directories) == 9
    assert str(report).endswith(f"'{root}/d2': permission denied, ...")
