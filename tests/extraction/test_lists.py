import csv
import errno
import json
import os
from pathlib import Path

import pytest

from fastbb.extraction import lists
from fastbb.extraction.listing import Listing
from fastbb.extraction.sources import InputError, Source

SECRET_URL = "https://user:pa55@host.org:8080/a/b.jpg?X-Signature=s3cret&x=1#frag"


def ids(*inputs: str | Path) -> list[str]:
    return [source.id for source in Listing(inputs)]


LISTED = [("a.jpg", None), ("sub/b, c.png", "named"), ("../é.gif", None)]


def write_list(path: Path) -> None:
    records = [{"path": image, "id": name or image, "label": 3} for image, name in LISTED]
    if path.suffix == ".txt":
        path.write_text("\ufeff" + "\r\n".join(image for image, _ in LISTED) + "\n\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, ["label", "path", "id"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.Table.from_pylist(records), path, row_group_size=2
        )


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl", ".parquet"])
def test_list_keeps_its_order_and_resolves_paths_from_its_directory(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"list{suffix}"
    write_list(path)
    named = suffix != ".txt"
    label = {"label": 3 if suffix in (".jsonl", ".parquet") else "3"}
    assert list(Listing([path])) == [
        Source(
            (name if named else None) or image,
            os.path.normpath(tmp_path / image),
            columns=label | ({} if name in (None, image) else {"path": image}) if named else None,
        )
        for image, name in LISTED
    ]


def test_file_name_column_of_image_folders_is_read(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,hello\n")
    assert ids(tmp_path / "metadata.csv") == ["a.jpg"]


def test_a_text_list_has_comments_and_blank_lines(tmp_path: Path) -> None:
    for name in ("#1.jpg", " #3.jpg"):
        (tmp_path / name).touch()
    text = "# a.jpg\n  # indented\n b .jpg \n\n \t\n#1.jpg\n#2.jpg\npipe:x.jpg\n #3.jpg\n#nul\0\n"
    (tmp_path / "list.txt").write_text(text)
    assert ids(tmp_path / "list.txt") == [" b .jpg ", "#1.jpg", "pipe:x.jpg", " #3.jpg"]


@pytest.mark.parametrize("start", ["\n", "\ufeff\r\n \t\n"])
def test_blank_lines_before_the_header_are_passed_over(tmp_path: Path, start: str) -> None:
    (tmp_path / "list.csv").write_text(start + "path;text;\na.jpg;x;\n", newline="")
    assert [(s.id, s.columns) for s in Listing([tmp_path / "list.csv"])] == [
        ("a.jpg", {"text": "x", "": ""})
    ]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "images" / "metadata.csv").write_text("\nfile_name,text\na.jpg,hello\n")
    (source,) = Listing([tmp_path / "images"])
    assert source.columns == {"text": "hello"}


@pytest.mark.parametrize("name", ["path", "file_name", "filename", "image"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_of_a_csv_is_found_by_its_header(
    tmp_path: Path, name: str, delimiter: str
) -> None:
    rows = [["note, a", name, "b;c"], ["1;2\t", "x, y.jpg", "a\r\nb"], ['"q"', "z;.jpg", ""]]
    with open(tmp_path / "list.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
    listed = list(Listing([tmp_path / "list.csv"]))
    assert [source.id for source in listed] == ["x, y.jpg", "z;.jpg"]
    assert listed[0].columns == {"note, a": "1;2\t", "b;c": "a\r\nb"}


def test_a_comma_wins_where_the_header_has_several_delimiters(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,a;image\nx;y.jpg,1\n")
    (source,) = Listing([tmp_path / "list.csv"])
    assert source.id == "x;y.jpg" and source.columns == {"a;image": "1"}


def test_columns_of_json_lines_are_json_values(tmp_path: Path) -> None:
    row = '{"image": {"path": "a.jpg", "bytes": null}, "score": NaN, "boxes": [[1, -Infinity]]}'
    (tmp_path / "list.jsonl").write_text(f'{row}\n  \n{{"path": "b.jpg", "image": "c.jpg"}}\n')
    assert list(Listing([tmp_path / "list.jsonl"])) == [
        Source("a.jpg", f"{tmp_path}/a.jpg", columns={"score": None, "boxes": [[1, None]]}),
        Source("b.jpg", f"{tmp_path}/b.jpg", columns={"image": "c.jpg"}),
    ]


def test_a_row_nested_too_deep_is_an_error(tmp_path: Path) -> None:
    for depth in (40, 100_000):
        text = '{"path": "a.jpg", "x": ' + "[" * depth + "]" * depth + "}"
        (tmp_path / "list.jsonl").write_text(text)
        with pytest.raises(InputError, match="row 1"):
            ids(tmp_path / "list.jsonl")


def test_a_list_in_a_brace_pattern_has_ids_that_start_with_its_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("path\nx.jpg\n")
    assert ids(f"{tmp_path}/{{a,b}}.csv") == ["a.csv/x.jpg", "b.csv/x.jpg"]


def test_a_list_without_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denying(path: str, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    (tmp_path / "list.txt").touch()
    monkeypatch.setattr(lists, "open", denying, raising=False)
    with pytest.raises(InputError, match="list.txt: cannot be read: Permission denied"):
        ids(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "id,path\n,a.jpg\n,b.jpg\n"),
        ("list.jsonl", '{"id": "", "path": "a.jpg"}\n{"id": null, "path": "b.jpg"}\n'),
    ],
)
def test_an_empty_id_counts_as_missing(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert ids(tmp_path / name) == ["a.jpg", "b.jpg"]


def test_urls_in_a_list_become_rows_without_their_credentials(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"{SECRET_URL}\na.jpg\n")
    listed = list(Listing([path]))
    assert listed[0] == Source("https://host.org:8080/a/b.jpg", "https://host.org:8080/a/b.jpg")
    assert "s3cret" not in repr(listed) and "pa55" not in repr(listed)
