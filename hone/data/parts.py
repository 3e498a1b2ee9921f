"""Files cut into parts of like size, so that many processes can read one data set."""

from collections.abc import Sequence
from dataclasses import dataclass

from hone.data.files import DataFile

PART_BYTES = (4 * 2**20, 64 * 2**20)
"""Least and most bytes of a part: seconds to a minute of tokenising."""
PARTS = 512
"""About how many parts there are between these bounds: enough for many workers, and not too many files."""


@dataclass(frozen=True)
class Part:
    """Some rows of a file: the lines that begin in `start` to `end` (bytes), or the Parquet row groups of these numbers; or all of it."""

    file: DataFile
    start: int = 0
    end: int | None = None
    """None: to the end of the file."""
    bytes: int | None = None
    """About how many there are in some row groups."""

    @property
    def size(self) -> int:
        """Bytes as stored, about."""
        if self.bytes is not None:
            return self.bytes
        return self.file.size if self.end is None else self.end - self.start


def cut(files: Sequence[DataFile], *, part_bytes: int | None = None) -> list[Part]:
    """The parts of files, in order. Lines and Parquet row groups can be parted; anything else, and what is compressed, stays whole."""
    size = part_bytes or _part_bytes(files)
    return [part for file in files for part in _parts(file, size)]


def bundled(files: Sequence[DataFile]) -> list[list[Part]]:
    """The parts of files, in order, those of small files together in bundles of about one size: a folder of pictures has many."""
    size, held = _part_bytes(files), 0
    bundles: list[list[Part]] = []
    for part in cut(files):
        if not bundles or held + part.size > size:
            bundles.append([part])
            held = part.size
        else:
            bundles[-1].append(part)
            held += part.size
    return bundles


def _part_bytes(files: Sequence[DataFile]) -> int:
    least, most = PART_BYTES
    return min(max(sum(file.size for file in files) // PARTS, least), most)


def _parts(file: DataFile, part_bytes: int) -> list[Part]:
    if file.size <= part_bytes or file.compression:
        return [Part(file)]
    if file.kind == "jsonl":
        each = -(-file.size // -(-file.size // part_bytes))  # all of like size, and none larger
        return [Part(file, start, min(start + each, file.size)) for start in range(0, file.size, each)]
    if file.kind == "parquet":
        return _parquet_parts(file, part_bytes) or [Part(file)]
    return [Part(file)]


def _parquet_parts(file: DataFile, part_bytes: int) -> list[Part]:
    """Row groups, small ones together."""
    made: list[Part] = []
    for n, size in enumerate(_row_group_bytes(file)):
        last = made[-1] if made else None
        if last and last.size + size <= part_bytes:
            made[-1] = Part(file, last.start, n + 1, last.size + size)
        else:
            made.append(Part(file, n, n + 1, size))
    return made


def _row_group_bytes(file: DataFile) -> list[int]:
    """Of each, uncompressed; none where the file cannot be read, which reading it will say."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with file.filesystem.open_input_file(file.path) as opened, ParquetFile(opened) as table:
            return [int(table.metadata.row_group(n).total_byte_size) for n in range(table.num_row_groups)]
    except (OSError, pa.ArrowException):
        return []


def numbers_in(part: Part) -> int:
    """How many lines (or Parquet rows) begin in a part of a file, so that the rows of the next part can be numbered on."""
    if part.end is None:
        return 0
    if part.file.kind == "parquet":
        from pyarrow.parquet import ParquetFile

        with part.file.filesystem.open_input_file(part.file.path) as opened, ParquetFile(opened) as table:
            return sum(table.metadata.row_group(n).num_rows for n in range(part.start, part.end))
    before = max(part.start - 1, 0)
    with part.file.filesystem.open_input_file(part.file.path) as stream:
        stream.seek(before)
        return int(stream.read(part.end - 1 - before).count(b"\n")) + (part.start == 0)
