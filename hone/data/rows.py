"""Checked rows of one shape, file by file: `train.jsonl:17: "messages" is empty; ...`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from hone.data.files import MEDIA, DataFile
from hone.data.formats import Format, Row, convert, media_path
from hone.data.readers import read_raw
from hone.errors import DataError

SHOWN = 20


@dataclass(frozen=True)
class ReadRow:
    """A row, and where it stands; or what is wrong with it."""

    file: DataFile
    number: int
    """Line, or row from 1 where the file has no lines."""
    row: Row | None = None
    format: Format | None = None
    error: str = ""

    @property
    def place(self) -> str:
        return self.file.name if self.file.kind in MEDIA else f"{self.file.name}:{self.number}"


def read_rows(files: Sequence[DataFile], *, shape: str | None = None, columns: Mapping[str, str] | None = None) -> Iterator[ReadRow]:
    """Every row of the files, good or bad, in order and a few at a time.

    Args:
        files: From `find_files`.
        shape: The shape of row that is wanted; by default what the columns of each row make.
        columns: Our name of a column -> its name in the files, where they differ.

    Raises:
        DataError: a file that cannot be read at all.
    """
    for file in files:
        for number, raw in read_raw(file):
            if isinstance(raw, DataError):
                yield ReadRow(file, number, error=raw.message)
                continue
            try:
                row, found = convert(raw, shape=shape, columns=columns)
                yield ReadRow(file, number, _with_path(row, file), found)
            except DataError as error:
                yield ReadRow(file, number, error=error.message)


class BadRows:
    """Counts bad rows, and holds what to say of the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, read: ReadRow) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{read.place}: {read.error}")

    def message(self) -> str:
        """One line for each of the first, the rest counted."""
        more = [f"... and {self.count - len(self.first)} more bad rows"] if self.count > len(self.first) else []
        return "\n".join([*self.first, *more])


def _with_path(row: Row, file: DataFile) -> Row:
    """A picture or sound that a row of a table names is looked for beside that table."""
    if file.kind in MEDIA:
        return row
    folder = str(PurePosixPath(file.path).parent)
    return row | {name: media_path(row[name], folder, name) for name in MEDIA if isinstance(row.get(name), str)}
