"""From what a recipe names (a path, a folder, a glob, an object store URI, or several) to the files behind it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hone.errors import DataError
from hone.folder import filesystem_of, first_line, how_to_reach
from hone.object_store import split_query

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".md": "text",
    ".jpg": "image",
    ".jpeg": "image",
    ".png": "image",
    ".webp": "image",
    ".bmp": "image",
    ".gif": "image",
    ".wav": "audio",
    ".flac": "audio",
    ".ogg": "audio",
    ".mp3": "audio",
}
MEDIA = ("image", "audio")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
WILDCARDS = re.compile(r"[*?\[]")
CHARACTER_CLASS = re.compile(r"\[[^\]]+\]")


@dataclass(frozen=True)
class DataFile:
    """One file of rows, or one picture or sound."""

    name: str
    """As people are told of it: its path or URI."""
    path: str
    """As `filesystem` knows it."""
    filesystem: Any
    """A `pyarrow.fs.FileSystem`."""
    size: int
    """Bytes, as stored."""
    modified_ns: int | None
    """When it was last written, in nanoseconds since 1970, where the file system says."""
    kind: str
    compression: str | None = None
    class_folder: str | None = None
    """The folder that a picture or sound is in, which is its class where there are several."""


def find_files(sources: str | Sequence[str]) -> list[DataFile]:
    """Every file behind the sources, those of each in the order of their paths; hidden ones are passed over.

    Raises:
        DataError: nothing there, a file of no kind that is known, or a file system that does not answer.
    """
    found: dict[str, DataFile] = {}
    for source in [sources] if isinstance(sources, str) else sources:
        for file in _behind(source):
            found.setdefault(file.name, file)
    return list(found.values())


def check_unchanged(files: Sequence[DataFile]) -> None:
    """Compare files with what they were when they were found.

    Raises:
        DataError: one has been written to since, or is gone.
    """
    for file in files:
        info = file.filesystem.get_file_info(file.path)
        if (info.size, info.mtime_ns) != (file.size, file.modified_ns):
            raise DataError(f"{file.name}: was changed while it was read; start again")


def _behind(source: str) -> list[DataFile]:
    from pyarrow.fs import FileSelector, FileType

    filesystem, path, prefix = _filesystem(source)
    wild = WILDCARDS.search(path)
    root = path[: wild.start()].rpartition("/")[0] if wild else path
    try:
        if wild:
            infos = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
            pattern = _glob(path)
            infos = [info for info in infos if pattern.fullmatch(info.path)]
        else:
            info = filesystem.get_file_info(path)
            if info.type == FileType.NotFound:
                raise DataError(f"{source}: no such data file")
            infos = [info]
            if info.type == FileType.Directory:
                infos = filesystem.get_file_info(FileSelector(path, recursive=True))
    except OSError as error:
        raise DataError(f"{split_query(source)[0]}: cannot be read ({first_line(error)}); {how_to_reach(source)}") from None
    is_one = not wild and len(infos) == 1 and infos[0].path == path
    files = [_file(info, filesystem, prefix, root=root, named=is_one) for info in sorted(infos, key=lambda info: info.path) if info.is_file]
    known = [file for file in files if file is not None]
    if not known:
        raise DataError(f"{source}: no data files there; known are {', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}")
    return known


def _file(info: Any, filesystem: Any, prefix: str, *, root: str, named: bool) -> DataFile | None:
    """The file, or None for what stands in a folder and is no data."""
    path = PurePosixPath(info.path)
    below = path.relative_to(root).parts if not named and path.is_relative_to(root) else (path.name,)
    if not named and any(part.startswith((".", "_")) for part in below):
        return None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    suffix = (suffixes[:-1] if compression else suffixes)[-1:] or [""]
    kind = KINDS.get(suffix[0])
    name = prefix + info.path
    if kind is None:
        if named:
            raise DataError(f"{name}: unknown kind of file {path.suffix!r}; use {', '.join(KINDS)}")
        return None
    if info.size == 0 and kind not in MEDIA:
        raise DataError(f"{name}: the file is empty")
    return DataFile(name, info.path, filesystem, info.size, info.mtime_ns, kind, compression, path.parent.name if kind in MEDIA else None)


def _filesystem(source: str) -> tuple[Any, str, str]:
    """File system, path in it, and what stands before such a path in its URI."""
    if "://" not in source:
        return *filesystem_of(source), ""
    uri, query = split_query(source)
    wild = WILDCARDS.search(uri)
    plain = uri[: wild.start()] if wild else uri  # a URI may not hold wildcards
    filesystem, path = filesystem_of(f"{plain}?{query}" if query else plain, named=uri, wrong=DataError)
    rest = uri[wild.start() :] if wild else ""
    if rest and plain.endswith("/") and not path.endswith("/"):
        path += "/"
    scheme = source.partition("://")[0]
    return filesystem, path + rest, "" if scheme == "file" else f"{scheme}://"


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` within one folder, `**` across folders, `[abc]` one of some characters."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part) or (part if CHARACTER_CLASS.fullmatch(part) else re.escape(part)) for part in parts))
