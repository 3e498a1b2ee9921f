"""A folder wherever it is: on this machine, or in an object store through pyarrow.fs."""

import os
import re
from pathlib import Path
from typing import Any

from hone.errors import HoneError, ResourceError
from hone.object_store import open_store, split_query


class Folder:
    """A folder by its path or URI (`s3://bucket/path`, `gs://...`). Folders are made when something is written to them."""

    def __init__(self, where: str | Path, *, filesystem: Any = None) -> None:
        """
        Args:
            where: Path or URI; a path in `filesystem`, where that is given.
            filesystem: A `pyarrow.fs.FileSystem`.

        Raises:
            ResourceError: no file system for that URI.
        """
        self._name = split_query(str(where))[0].rstrip("/")
        if filesystem is not None:
            self._filesystem, self._path = filesystem, str(where)
            return
        self._filesystem, self._path = filesystem_of(str(where))

    def __str__(self) -> str:
        return self._name

    def below(self, name: str) -> "Folder":
        """A folder in this one."""
        made = Folder(f"{self._path}/{name}", filesystem=self._filesystem)
        made._name = f"{self._name}/{name}"
        return made

    def folders(self) -> list[str]:
        """Names of the folders in it; none where it is not there yet."""
        from pyarrow.fs import FileType

        return [info.base_name for info in self._infos() if info.type == FileType.Directory]

    def files(self) -> list[str]:
        """Names of the files in it; none where it is not there yet."""
        return [info.base_name for info in self._infos() if info.is_file]

    def _infos(self) -> list[Any]:
        from pyarrow.fs import FileSelector

        return list(self._filesystem.get_file_info(FileSelector(self._path, allow_not_found=True)))

    def size(self, name: str) -> int | None:
        """Bytes of a file in it; None where there is no such file."""
        info = self._filesystem.get_file_info(f"{self._path}/{name}")
        return int(info.size) if info.is_file else None

    def read(self, name: str) -> bytes:
        with self.reader(name) as file:
            return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        with self.writer(name) as file:
            file.write(data)

    def reader(self, name: str) -> Any:
        """The file as a stream."""
        return self._filesystem.open_input_stream(f"{self._path}/{name}")

    def opened(self, name: str) -> Any:
        """The file, to be read at any place."""
        return self._filesystem.open_input_file(f"{self._path}/{name}")

    def writer(self, name: str) -> Any:
        """A new file as a stream; in an object store it is there once it is closed."""
        self._filesystem.create_dir(self._path, recursive=True)
        return self._filesystem.open_output_stream(f"{self._path}/{name}")

    def check_writable(self, what: str) -> None:
        """Write a small file and remove it.

        Args:
            what: What people know it by, such as a key of the recipe.

        Raises:
            ResourceError: that cannot be done.
        """
        name = f".hone-{os.getpid()}"
        try:
            self.write(name, b"may be removed")
            self.remove(name)
        except OSError as error:
            raise ResourceError(f"{what} {self}: cannot be written ({first_line(error)}); {how_to_reach(self._name)}") from None

    def remove(self, name: str) -> None:
        self._filesystem.delete_file(f"{self._path}/{name}")

    def remove_folder(self, name: str) -> None:
        self._filesystem.delete_dir(f"{self._path}/{name}")


def filesystem_of(where: str, *, named: str | None = None, wrong: type[HoneError] = ResourceError) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of a path or URI, and the path in it.

    Args:
        where: Path or URI.
        named: What people are told of it by, where that is something else.
        wrong: What to raise where there is no file system for that URI.
    """
    from pyarrow import ArrowException
    from pyarrow.fs import LocalFileSystem

    if "://" not in where:
        return LocalFileSystem(), str(Path(where).expanduser().absolute())
    try:
        return open_store(where)
    except (ArrowException, OSError, ValueError) as error:
        raise wrong(f"{_without_key(named or where)}: cannot be opened ({first_line(error)})") from None


def how_to_reach(where: str) -> str:
    """What to look at where a path or URI cannot be read or written."""
    if "://" not in where:
        return "check the path and its permissions, on every node"
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if where.startswith("s3:") else "credentials"
    return f"check bucket, endpoint and {keys}, on every node"


def _without_key(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", split_query(uri)[0])


def first_line(error: BaseException) -> str:
    """What an error says, cut to what fits into a line of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
