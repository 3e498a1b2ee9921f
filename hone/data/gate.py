"""Looks through training and validation rows for what spoils a fine-tuning, before any GPU is leased."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hone.data.private import kinds_in, texts_in
from hone.data.report import SHOWN, Finding, Histogram, Part, Report
from hone.data.rows import ReadRow

NEAR_ROWS = 50_000
"""Rows among which near duplicates are looked for; the look takes about a third of a millisecond for each."""
NEAR_SIMILARITY = 0.8
"""Estimated share of five-character pieces in common (Jaccard, by MinHash)."""
PERMUTATIONS = 64
PIECE = 5
BINS = 12


@dataclass(frozen=True)
class Measured:
    """One row as the base model's tokenizer sees it."""

    tokens: int
    targets: int
    """Predicted tokens within max_length, or 1 for a labelled row."""
    is_cut: bool


Measure = Callable[[dict[str, Any]], Measured]


def examine(
    train: Iterable[ReadRow], validation: Iterable[ReadRow] | None = None, *, measure: Measure | None = None, near_rows: int = NEAR_ROWS
) -> Report:
    """Everything that is to be said of the rows.

    Args:
        train: Training rows, good and bad, as `read_rows` gives them.
        validation: Validation rows; None where they will be held out of the training rows.
        measure: Tokens of a row; without it lengths are characters, and nothing is said of targets.
        near_rows: How many rows to look at for near duplicates; 0 for none.

    Raises:
        DataError: a file that cannot be read at all.
    """
    look = _Look(measure, near_rows)
    parts = [look.part(rows, number) for number, rows in enumerate((train, validation)) if rows is not None]
    return Report(
        train=parts[0].summary(),
        validation=parts[1].summary() if len(parts) > 1 else None,
        findings=look.findings(parts),
        notes=look.notes(),
    )


@dataclass
class _Part:
    """What is gathered of one part: a few bytes a row."""

    unit: str
    files: dict[str, None] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)

    def summary(self) -> Part:
        return Part(
            files=len(self.files),
            rows=len(self.digests),
            formats=dict(self.formats.most_common()),
            lengths=_histogram(self.lengths, self.unit) if self.lengths else None,
            labels=dict(self.labels.most_common()) or None,
        )


class _Look:
    def __init__(self, measure: Measure | None, near_rows: int) -> None:
        self._measure = measure
        self._counts: Counter[str] = Counter()
        self._where: dict[str, list[str]] = defaultdict(list)
        self._near = _NearDuplicates(near_rows) if near_rows else None
        self._first: dict[int, tuple[str, int]] = {}
        """Digest of a row -> where it stood first, and in which part."""

    def part(self, rows: Iterable[ReadRow], number: int) -> _Part:
        part = _Part("tokens" if self._measure else "characters")
        for read in rows:
            part.files[read.file.name] = None
            if read.row is None or read.format is None:
                self._add("bad_rows", f"{read.place}: {read.error}")
                continue
            part.formats[read.format.name] += 1
            part.labels.update(_labels(read.row))
            self._duplicates(read, part, number)
            self._private(read)
            part.lengths.append(self._length(read))
        return part

    def findings(self, parts: list[_Part]) -> list[Finding]:
        if not parts[0].digests:
            self._add("no_rows", "")
        if len(parts[0].labels) == 1 and sum(parts[0].labels.values()) > 1:
            self._add("one_label", next(iter(parts[0].labels)))
        for unknown in sorted(set(parts[1].labels) - set(parts[0].labels)) if len(parts) > 1 else []:
            self._add("unknown_labels", f"{unknown!r} in {parts[1].labels[unknown]} rows", parts[1].labels[unknown])
        return [Finding(kind=kind, count=count, where=self._where[kind]) for kind, count in self._counts.items()]

    def notes(self) -> list[str]:
        passed_over = self._near.passed_over if self._near else 0
        notes = [f"near duplicates were looked for among the first {self._near.limit:,} rows"] if self._near and passed_over else []
        return notes if self._measure else [*notes, "lengths are characters; name a base model to count tokens and to look at targets"]

    def _add(self, kind: str, where: str, count: int = 1) -> None:
        self._counts[kind] += count
        if len(self._where[kind]) < SHOWN and where:
            self._where[kind].append(where)

    def _duplicates(self, read: ReadRow, part: _Part, number: int) -> None:
        assert read.row is not None
        digest = row_digest(read.row)
        part.digests.append(digest)
        place, of_part = self._first.setdefault(digest, (read.place, number))
        if (place, of_part) != (read.place, number):
            self._add("leakage" if of_part != number else "exact_duplicates", f"{read.place} is {place}")
        elif self._near and (like := self._near.add(read, number)):
            other, is_leak = like
            self._add("near_leakage" if is_leak else "near_duplicates", f"{read.place} is nearly {other}")

    def _private(self, read: ReadRow) -> None:
        for kind in sorted(set().union(*(kinds_in(text) for text in texts_in(read.row)))):
            self._add(kind, read.place)

    def _length(self, read: ReadRow) -> int:
        assert read.row is not None
        if self._measure is None:
            return sum(map(len, texts_in(read.row)))
        measured = self._measure(read.row)
        if not measured.targets:
            self._add("empty_targets", read.place)
        elif measured.is_cut:
            self._add("cut_targets", f"{read.place}: {measured.tokens:,} tokens")
        return measured.tokens


class _NearDuplicates:
    """MinHash signatures of the rows so far (https://doi.org/10.1109/SEQUEN.1997.666900), in datasketch's index."""

    def __init__(self, limit: int) -> None:
        from datasketch import MinHashLSH

        self.limit = limit
        self.passed_over = 0
        self._index = MinHashLSH(threshold=NEAR_SIMILARITY, num_perm=PERMUTATIONS)
        self._seen: list[tuple[str, int, Any]] = []

    def add(self, read: ReadRow, part: int) -> tuple[str, bool] | None:
        """Where a row stands that this one nearly is, and whether it is in the other part."""
        from datasketch import MinHash

        text = " ".join(" ".join(texts_in(read.row)).lower().split())
        if len(self._seen) >= self.limit:
            self.passed_over += 1
            return None
        if len(text) < 4 * PIECE:
            return None
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([text[n : n + PIECE].encode() for n in range(len(text) - PIECE + 1)])
        like = [self._seen[key] for key in self._index.query(sketch)]
        close = next((seen for seen in like if seen[2].jaccard(sketch) >= NEAR_SIMILARITY), None)
        self._index.insert(len(self._seen), sketch)
        self._seen.append((read.place, part, sketch))
        return (close[0], close[1] != part) if close else None


def row_digest(row: dict[str, Any]) -> int:
    """64 bits that two rows share only if they are the same."""
    text = json.dumps(row, sort_keys=True, default=lambda value: hashlib.sha256(value).hexdigest())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _labels(row: dict[str, Any]) -> list[str]:
    if "label" in row:
        return [row["label"]]
    return list(row.get("labels", []))


def _histogram(lengths: list[int], unit: str) -> Histogram:
    values = np.asarray(lengths)
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
