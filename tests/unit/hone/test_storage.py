"""The home, and files that are written whole or not at all."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hone.errors import ResourceError
from hone.storage import Home, new_folder, write_text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_before_anything_starts(small_disk: Path) -> None:
    with pytest.raises(ResourceError, match="8 MiB of disk left and 256 MiB are needed; free some room"):
        Home(small_disk / "home").ready()


def test_a_disk_that_fills_up_leaves_the_old_file(small_disk: Path) -> None:
    write_text(small_disk / "a.txt", "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(small_disk / "a.txt", "x" * 9 * 2**20)
    assert [p.name for p in small_disk.iterdir()] == ["a.txt"]
    assert (small_disk / "a.txt").read_text() == "old"


def test_a_home_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ResourceError, match="cannot write here"):
        Home("/proc/nowhere").ready()


def test_an_object_store_is_refused_with_the_reason() -> None:
    with pytest.raises(ResourceError, match="needs a folder that all nodes mount"):
        Home("s3://bucket/hone")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "made"
    with pytest.raises(FileNotFoundError), new_folder(final) as staging:
        (staging / "part").write_text((staging / "missing").read_text())
    assert list(tmp_path.iterdir()) == []
    with new_folder(final) as staging:
        (staging / "whole").touch()
    assert [p.name for p in final.iterdir()] == ["whole"]


def test_the_first_of_two_makers_wins(tmp_path: Path) -> None:
    final = tmp_path / "made"
    with new_folder(final) as slow, new_folder(final) as fast:
        (slow / "slow").touch()
        (fast / "fast").touch()
    assert [p.name for p in final.iterdir()] == ["fast"]
