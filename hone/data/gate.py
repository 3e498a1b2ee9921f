"""Looks through training and validation rows for what spoils a fine-tuning, before any GPU is leased."""

import bisect
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hone.data.files import MEDIA
from hone.data.parts import Part, numbers_in
from hone.data.private import kinds_in, texts_in
from hone.data.report import MEANINGS, SHOWN, Finding, Histogram, Report, Summary
from hone.data.rows import ReadRow, read_rows
from hone.errors import DataError
from hone.storage import write_json

NEAR_ROWS = 50_000
"""Rows among which near duplicates are looked for; the look takes about a quarter of a millisecond for each."""
NEAR_SIMILARITY = 0.8
"""Estimated share of five-character pieces in common (Jaccard, by MinHash)."""
PERMUTATIONS = 64
SCHEME: Literal["affine32"] = "affine32"
"""How datasketch permutes: 32-bit hashes, with 32-bit arithmetic."""
PIECE = 5
BETWEEN = "\0"
"""Between the texts of a row that are looked at together; it stands in none of them, and no private data reaches across it."""
LOOK_FILE = "look.json"
LOOK_ARRAYS = "look.npz"
ARRAYS = ("digests", "lengths", "numbers")
PLAIN = ("formats", "labels", "counts", "where")
BINS = 12


@dataclass(frozen=True)
class Measured:
    """One row as the base model's tokenizer sees it."""

    tokens: int
    targets: int
    """Predicted tokens within max_length, or 1 for a labelled row."""
    is_cut: bool


Measure = Callable[[ReadRow], Measured]
"""Raises DataError where the row is bad for its task."""
Spot = tuple[int, int]
"""Where a row stands: which part, and its number there."""


def look_at(
    parts: Sequence[Part],
    *,
    columns: Mapping[str, str] | None = None,
    shape: str | None = None,
    group_by: str | None = None,
    measure: Measure | None = None,
    unit: str = "tokens",
    near_rows: int = NEAR_ROWS,
) -> "Look":
    """Read all the rows of these parts.

    Args:
        parts: From `cut`.
        columns: Our name of a column -> its name in the files.
        shape: The shape of row that is wanted, by default whatever is recognised.
        group_by: Column that every row must have.
        measure: Tokens of a row; without it lengths are characters, and nothing is said of targets.
        unit: What `measure` counts.
        near_rows: How many rows to look at for near duplicates; 0 for none.

    Raises:
        DataError: a file that cannot be read at all.
    """
    look = Look(unit=unit if measure else "characters")
    for part in parts:
        look.begin(part, sketched_rows=near_rows)
        for read in read_rows([part], shape=shape, columns=columns, group_by=group_by):
            try:
                measured = measure(read) if measure and read.row else None
            except DataError as error:
                read, measured = ReadRow(read.file, read.number, error=error.message), None
            look.add(read, measured)
    return look


@dataclass(frozen=True)
class SeenPart:
    """A part of a file that was read."""

    file: str
    is_media: bool
    is_first: bool
    """Whether the file begins with it."""
    numbers: int
    """How far the numbers of the next part's rows are on; 0 for a whole file."""


class Look:
    """What was seen of some parts: counts, and a few bytes for each row. Looks at different parts can be joined."""

    def __init__(self, *, unit: str) -> None:
        self.unit = unit
        self.parts: list[SeenPart] = []
        self.formats: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        """Findings that a row shows by itself."""
        self.where: dict[str, list[tuple[Spot, str]]] = {}
        self.digests = array("Q")
        self.lengths = array("I")
        self.numbers = array("I")
        """Where each row stands in its part. With digest and length, 16 bytes a row are all that is held of it."""
        self._firsts: list[int] = []
        """For each part, which row is its first."""
        self.sketches: list[npt.NDArray[np.uint32]] = []
        """MinHash signatures of the first rows (https://doi.org/10.1109/SEQUEN.1997.666900); empty for the shortest."""
        self._sketched_rows = 0

    def begin(self, part: Part, *, sketched_rows: int) -> None:
        """The rows that follow are of this part. The first `sketched_rows` rows of all are looked at for near duplicates."""
        self.parts.append(SeenPart(part.file.name, part.file.kind in MEDIA, part.start == 0, numbers_in(part)))
        self._firsts.append(len(self.digests))
        self._sketched_rows = sketched_rows

    def add(self, read: ReadRow, measured: Measured | None) -> None:
        """Look at a row."""
        spot = (len(self.parts) - 1, read.number)
        if read.row is None or read.format is None:
            self._say("bad_rows", spot, read.error)
            return
        self.formats[read.format.name] += 1
        self.labels.update(_labels(read.row))
        self.digests.append(row_digest(read.row if read.content is None else {**read.row, read.format.shape: read.content}))
        self.numbers.append(read.number)
        if len(self.sketches) < min(self._sketched_rows, len(self.digests)):
            self.sketches.append(_sketch(read.row))
        for kind in sorted(kinds_in(BETWEEN.join(texts_in(read.row)))):
            self._say(kind, spot)
        if measured or read.content is None:  # a picture or sound has no characters
            self.lengths.append(measured.tokens if measured else sum(map(len, texts_in(read.row))))
        if measured and not measured.targets:
            self._say("empty_targets", spot)
        elif measured and measured.is_cut:
            self._say("cut_targets", spot, f"{measured.tokens:,} tokens")

    def join(self, other: "Look") -> None:
        """Take in what was seen of the parts that follow these."""
        shift = len(self.parts)
        self._firsts += [len(self.digests) + first for first in other._firsts]
        if len(self.sketches) == len(self.digests):  # else the first rows are over
            self.sketches += other.sketches
        self.parts += other.parts
        self.formats += other.formats
        self.labels += other.labels
        self.counts += other.counts
        for kind, places in other.where.items():
            mine = self.where.setdefault(kind, [])
            mine += [((part + shift, number), text) for (part, number), text in places[: SHOWN - len(mine)]]
        self.digests += other.digests
        self.lengths += other.lengths
        self.numbers += other.numbers

    def summary(self) -> Summary:
        return Summary(
            files=len({part.file for part in self.parts}),
            rows=len(self.digests),
            formats=dict(self.formats.most_common()),
            lengths=_histogram(np.asarray(self.lengths), self.unit) if self.lengths else None,
            labels=dict(self.labels.most_common()) or None,
        )

    def spot(self, row: int) -> Spot:
        """Of a good row, by its number from 0."""
        return bisect.bisect_right(self._firsts, row) - 1, self.numbers[row]

    def place(self, spot: Spot) -> str:
        """A spot in words: the file, and the line or row."""
        at, number = spot
        file = self.parts[at].file
        while not self.parts[at].is_first:
            at -= 1
            number += self.parts[at].numbers
        return file if self.parts[at].is_media else f"{file}:{number}"

    def save(self, folder: Path) -> None:
        """Write it as look.json and look.npz."""
        sketches = np.zeros((len(self.sketches), PERMUTATIONS), dtype=np.uint32)
        for n, sketch in enumerate(self.sketches):
            sketches[n, : len(sketch)] = sketch
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in ARRAYS}
        np.savez(folder / LOOK_ARRAYS, sketches=sketches, has_sketch=np.array([len(s) > 0 for s in self.sketches], dtype=bool), **arrays)
        plain = {
            "unit": self.unit,
            "firsts": self._firsts,
            "parts": [asdict(part) for part in self.parts],
            **{name: getattr(self, name) for name in PLAIN},
        }
        write_json(folder / LOOK_FILE, plain)

    @classmethod
    def load(cls, folder: Path) -> "Look":
        """Read what `save` wrote."""
        plain = json.loads((folder / LOOK_FILE).read_text(encoding="utf-8"))
        look = cls(unit=plain["unit"])
        look._firsts = plain["firsts"]
        look.parts = [SeenPart(**part) for part in plain["parts"]]
        look.formats, look.labels, look.counts = (Counter(plain[name]) for name in ("formats", "labels", "counts"))
        look.where = {kind: [((spot[0], spot[1]), text) for spot, text in places] for kind, places in plain["where"].items()}
        with np.load(folder / LOOK_ARRAYS) as arrays:
            for name in ARRAYS:
                getattr(look, name).frombytes(arrays[name].tobytes())
            empty = np.empty(0, dtype=np.uint32)
            look.sketches = [s if has else empty for s, has in zip(arrays["sketches"], arrays["has_sketch"], strict=True)]
        return look

    def _say(self, kind: str, spot: Spot, text: str = "") -> None:
        self.counts[kind] += 1
        places = self.where.setdefault(kind, [])
        if len(places) < SHOWN:
            places.append((spot, text))


def joined(looks: Sequence[Look]) -> Look:
    """What was seen of all of them."""
    if len(looks) == 1:
        return looks[0]
    made = Look(unit=looks[0].unit)
    for look in looks:
        made.join(look)
    return made


def report(train: Look, validation: Look | None = None, *, near_rows: int = NEAR_ROWS) -> Report:
    """What two looks come to, each row by itself and all together."""
    return _Report(train, validation, near_rows).made()


class _Report:
    def __init__(self, train: Look, validation: Look | None, near_rows: int) -> None:
        self._looks = [train] if validation is None else [train, validation]
        self._near_rows = near_rows
        self._counts: Counter[str] = Counter()
        self._where: dict[str, list[str]] = {}

    def made(self) -> Report:
        self._each_by_itself()
        self._labels()
        self._the_same()
        self._nearly_the_same()
        order = [kind for kind in MEANINGS if kind in self._counts]
        findings = [Finding(kind=kind, count=self._counts[kind], where=self._where.get(kind, [])) for kind in order]
        summaries = [look.summary() for look in self._looks]
        return Report(train=summaries[0], validation=summaries[1] if len(summaries) > 1 else None, findings=findings, notes=self._notes())

    def _each_by_itself(self) -> None:
        for n, look in enumerate(self._looks):
            self._counts += look.counts
            for kind, places in look.where.items():
                for spot, text in places:
                    self._tell(kind, f"{self._looks[n].place(spot)}: {text}" if text else self._looks[n].place(spot))
        if not self._looks[0].digests:
            self._counts["no_rows"] = 1

    def _labels(self) -> None:
        known = self._looks[0].labels
        if len(known) == 1 and known.total() > 1:
            self._counts["one_label"] = 1
            self._tell("one_label", next(iter(known)))
        for look in self._looks[1:]:
            for label in sorted(set(look.labels) - set(known)):
                self._counts["unknown_labels"] += look.labels[label]
                self._tell("unknown_labels", f"{label!r} in {look.labels[label]} rows")

    def _the_same(self) -> None:
        """Rows that an earlier row is, training first."""
        digests = np.concatenate([np.asarray(look.digests) for look in self._looks])
        _, first, which = np.unique(digests, return_index=True, return_inverse=True)
        earlier = first[which]
        for row in np.flatnonzero(earlier != np.arange(len(digests))).tolist():
            self._alike(row, int(earlier[row]), ("exact_duplicates", "leakage"), "is")

    def _nearly_the_same(self) -> None:
        from datasketch import MinHashLSH

        index = MinHashLSH(threshold=NEAR_SIMILARITY, num_perm=PERMUTATIONS)
        sketches: dict[int, Any] = {}
        seen: set[int] = set()
        for n, look in enumerate(self._looks):
            for row, values in enumerate(look.sketches[: self._near_rows - len(seen)]):
                number = row + n * len(self._looks[0].digests)
                if not len(values) or look.digests[row] in seen:
                    continue
                seen.add(look.digests[row])
                sketch = _empty_sketch().copy()
                sketch.hashvalues = values
                close = next((key for key in index.query(sketch) if sketches[key].jaccard(sketch) >= NEAR_SIMILARITY), None)
                if close is not None:
                    self._alike(number, close, ("near_duplicates", "near_leakage"), "is nearly")
                index.insert(number, sketch)
                sketches[number] = sketch

    def _alike(self, row: int, other: int, kinds: tuple[str, str], verb: str) -> None:
        (n, spot), (m, other_spot) = self._at(row), self._at(other)
        kind = kinds[n != m]
        self._counts[kind] += 1
        if len(self._where.get(kind, [])) < SHOWN:
            self._tell(kind, f"{self._looks[n].place(spot)} {verb} {self._looks[m].place(other_spot)}")

    def _at(self, row: int) -> tuple[int, Spot]:
        n_train = len(self._looks[0].digests)
        n, row = (0, row) if row < n_train else (1, row - n_train)
        return n, self._looks[n].spot(row)

    def _tell(self, kind: str, text: str) -> None:
        places = self._where.setdefault(kind, [])
        if len(places) < SHOWN:
            places.append(text)

    def _notes(self) -> list[str]:
        notes = []
        if self._near_rows and sum(len(look.sketches) for look in self._looks) < sum(len(look.digests) for look in self._looks):
            notes.append(f"near duplicates were looked for among the first {self._near_rows:,} rows")
        if self._looks[0].unit == "characters" and self._looks[0].lengths:
            notes.append("lengths are characters; name a base model to count tokens and to look at targets")
        return notes


def row_digest(row: dict[str, Any]) -> int:
    """64 bits that two rows share only if they are the same. A picture or sound is given by a digest of its own."""
    return text_digest(json.dumps(row, sort_keys=True, default=str))


def text_digest(text: str) -> int:
    """64 bits that two texts share only if they are the same."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _sketch(row: dict[str, Any]) -> npt.NDArray[np.uint32]:
    """MinHash of the pieces of a row's texts, whatever their case and spacing; empty where there is too little text."""
    text = " ".join(" ".join(texts_in(row)).lower().split())
    if len(text) < 4 * PIECE:
        return np.empty(0, dtype=np.uint32)
    sketch = _empty_sketch().copy()
    sketch.update_batch(_pieces(text))
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


@lru_cache(maxsize=1)
def _empty_sketch() -> Any:
    """To be copied, which is much faster than drawing the permutations for each row. What is added to it are hashes already."""
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1, scheme=SCHEME, hashfunc=int)


def _pieces(text: str) -> list[int]:
    """32-bit hashes of each piece of PIECE characters, mixed as by https://prng.di.unimi.it/splitmix64.c."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    mixed = np.zeros(len(points) - PIECE + 1, dtype=np.uint64)
    for n in range(PIECE):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + points[n : n + len(mixed)] + np.uint64(1)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    pieces: list[int] = np.unique((mixed >> np.uint64(32)).astype(np.uint32)).tolist()
    return pieces


def _labels(row: dict[str, Any]) -> list[str]:
    if "label" in row:
        return [row["label"]]
    return list(row.get("labels", []))


def _histogram(values: npt.NDArray[np.int64], unit: str) -> Histogram:
    edges = np.unique(np.linspace(0, values.max() + 1, BINS + 1).astype(int))
    counts, _ = np.histogram(values, edges)
    middle, high = np.percentile(values, [50, 95]).astype(int).tolist()
    return Histogram(
        unit=unit,
        total=int(values.sum()),
        median=middle,
        p95=high,
        longest=int(values.max()),
        edges=edges.tolist(),
        counts=counts.tolist(),
    )
