"""Which files are behind what a recipe names."""

import gzip
from pathlib import Path

import pytest

from hone.data.files import find_files
from hone.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.csv", "deep/c.jsonl.gz", "deep/er/d.parquet", ".hidden/e.jsonl", "_logs/f.jsonl", "notes.pdf"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"{}") if name.endswith(".gz") else b"{}")
    return tmp_path


def names(folder: Path, *sources: str) -> list[str]:
    return [str(Path(file.name).relative_to(folder)) for file in find_files([str(folder / source) for source in sources])]


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        (["a.jsonl"], ["a.jsonl"]),
        (["."], ["a.jsonl", "b.csv", "deep/c.jsonl.gz", "deep/er/d.parquet"]),
        (["*.jsonl"], ["a.jsonl"]),
        (["**/*.jsonl*"], ["a.jsonl", "deep/c.jsonl.gz"]),
        (["deep/*"], ["deep/c.jsonl.gz"]),
        (["[ab].*"], ["a.jsonl", "b.csv"]),
        (["b.csv", "*.jsonl", "a.jsonl"], ["b.csv", "a.jsonl"]),
        ([".hidden/e.jsonl"], [".hidden/e.jsonl"]),
        (["_logs"], ["_logs/f.jsonl"]),
    ],
)
def test_paths_folders_and_globs(folder: Path, sources: list[str], found: list[str]) -> None:
    assert names(folder, *sources) == found


def test_kind_and_compression_come_from_the_name(folder: Path) -> None:
    [file] = find_files(str(folder / "deep" / "c.jsonl.gz"))
    assert (file.kind, file.compression) == ("jsonl", "gzip")


def test_pictures_are_of_the_class_of_their_folder(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "dog/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    assert [(file.kind, file.class_folder) for file in find_files(str(tmp_path))] == [("image", "cat"), ("image", "dog")]


def test_a_file_uri_is_a_path(folder: Path) -> None:
    assert [file.name for file in find_files(f"file://{folder}/*.csv")] == [f"{folder}/b.csv"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("none.jsonl", "no such data file"),
        ("none/*.jsonl", "no data files there"),
        ("notes.pdf", "unknown kind of file '.pdf'"),
    ],
)
def test_what_is_not_there_is_said(folder: Path, source: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        find_files(str(folder / source))


def test_an_unknown_scheme_is_an_error_of_one_line() -> None:
    with pytest.raises(DataError, match=r"nowhere://x/y: cannot be opened") as caught:
        find_files("nowhere://x/y")
    assert "\n" not in caught.value.message
