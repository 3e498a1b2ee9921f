"""What a look at the data finds."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.data.files import find_files
from hone.data.gate import BETWEEN, NEAR_ROWS, Measured, joined, look_at
from hone.data.gate import report as report_of
from hone.data.parts import cut
from hone.data.private import PATTERNS, kinds_in, possible, redacted, texts_in
from hone.data.report import Report
from hone.data.rows import ReadRow
from hone.errors import DataError

SENTENCE = "the quick brown fox jumps over a lazy dog and then runs back into the old dark forest before the night falls again"
WORDS = SENTENCE.split(" ")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def look(train: Path, validation: Path | None = None, **options: Any) -> Report:
    looks = [look_at(cut(find_files(str(path))), **options) for path in (train, validation) if path]
    return report_of(looks[0], looks[1] if validation else None, near_rows=options.get("near_rows", NEAR_ROWS))


def found(report: Report) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


def row(n: int, label: str = "a") -> dict[str, str]:
    return {"text": " ".join(WORDS[(n * 7 + k * (n + 1)) % len(WORDS)] + str((n * k) % 13) for k in range(20)), "label": label}


def test_clean_rows_have_no_findings(tmp_path: Path) -> None:
    report = look(written(tmp_path / "a.jsonl", *[row(n, "ab"[n % 2]) for n in range(40)]))
    assert report.findings == []
    assert (report.train.rows, report.train.labels, report.train.formats) == (40, {"a": 20, "b": 20}, {"text and label": 40})
    assert report.train.lengths is not None
    assert sum(report.train.lengths.counts) == 40


def test_duplicates_and_leaks_are_found_and_say_where(tmp_path: Path) -> None:
    changed = {**row(3), "text": row(3)["text"] + "!"}
    train = written(tmp_path / "t.jsonl", row(1), row(2, "b"), row(3), row(1), changed)
    held = written(tmp_path / "v.jsonl", row(2, "b"), {**row(1), "text": row(1)["text"] + "?"}, row(9, "z"))
    report = look(train, held)
    assert found(report) == {"exact_duplicates": 1, "near_duplicates": 1, "leakage": 1, "near_leakage": 1, "unknown_labels": 1}
    where = {finding.kind: finding.where[0] for finding in report.findings}
    assert where["exact_duplicates"] == f"{train}:4 is {train}:1"
    assert where["leakage"] == f"{held}:1 is {train}:2"
    assert where["near_leakage"] == f"{held}:2 is nearly {train}:1"
    assert [finding.kind for finding in report.stopping()] == ["leakage"]


def test_near_duplicates_are_looked_for_among_the_first_rows_alone(tmp_path: Path) -> None:
    changed = {**row(0), "text": row(0)["text"] + "!"}
    report = look(written(tmp_path / "t.jsonl", *[row(n, "ab"[n % 2]) for n in range(30)], changed), near_rows=10)
    assert found(report) == {}
    assert "the first 10 rows" in report.notes[0]


def test_twenty_bad_rows_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    report = look(written(tmp_path / "t.jsonl", *["{"] * 25, row(1), row(2, "b")))
    assert found(report) == {"bad_rows": 25}
    assert len(report.findings[0].where) == 20


def test_nothing_but_bad_rows_is_nothing_to_train_on(tmp_path: Path) -> None:
    assert set(found(look(written(tmp_path / "t.jsonl", "{")))) == {"bad_rows", "no_rows"}


def test_rows_without_targets_and_rows_that_are_cut(tmp_path: Path) -> None:
    lengths = iter([Measured(10, 5, is_cut=False), Measured(90, 3, is_cut=True), Measured(99, 0, is_cut=True)])
    report = look(written(tmp_path / "t.jsonl", row(1), row(2, "b"), row(3)), measure=lambda _: next(lengths))
    assert found(report) == {"cut_targets": 1, "empty_targets": 1}
    assert report.train.lengths is not None
    assert (report.train.lengths.unit, report.train.lengths.total) == ("tokens", 199)


@pytest.mark.parametrize(
    ("text", "kind", "left"),
    [
        ("write to ann.lee+x@mail.example.org.", "email", "write to [EMAIL]."),
        ("call +49 170 1234567 now", "phone", "call [PHONE] now"),
        ("call (555) 123-4567", "phone", "call [PHONE]"),
        ("card 4111 1111 1111 1111!", "card", "card [CARD]!"),
        ("key AKIAIOSFODNN7EXAMPLE", "secret", "key [SECRET]"),
        ("password: hunter2hunter2", "secret", "[SECRET]"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret", "[SECRET]"),
    ],
)
def test_private_data_is_found_and_taken_out(text: str, kind: str, left: str) -> None:
    assert kinds_in(text) == {kind}
    assert redacted({"messages": [{"content": text}]}) == {"messages": [{"content": left}]}


@pytest.mark.parametrize("kind", PATTERNS)
@given(data=st.data())
def test_a_glance_rules_out_nothing_that_a_closer_look_would_find(kind: str, data: st.DataObject) -> None:
    text = data.draw(st.from_regex(PATTERNS[kind]))
    assert PATTERNS[kind] in [pattern for _, pattern in possible(text)]


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",
        "1.2.3.4",
        "2024-01-02 10:11:12",
        "3 + 4 = 7",
        "user@localhost",
        "0.1234567890123",
        "mypassword",
        "a@b",
        "10,000,000",
    ],
)
def test_what_only_looks_private_is_left_alone(text: str) -> None:
    assert kinds_in(text) == set()


def test_no_secret_reaches_across_two_texts() -> None:
    turns = [{"role": "user", "content": "my password:"}, {"role": "assistant", "content": "never-tell-it-to-anyone"}]
    assert kinds_in(BETWEEN.join(texts_in({"messages": turns}))) == set()


def test_a_row_that_its_task_refuses_is_a_bad_row(tmp_path: Path) -> None:
    def refuse(read: ReadRow) -> Measured:
        if read.row and read.row["label"] == "b":
            raise DataError("not this one")
        return Measured(3, 1, is_cut=False)

    report = look(written(tmp_path / "t.jsonl", row(1), row(2, "b"), row(3, "c")), measure=refuse)
    [finding] = report.findings
    assert (finding.kind, finding.where) == ("bad_rows", [f"{tmp_path}/t.jsonl:2: not this one"])


def test_a_file_that_stands_in_two_looks_keeps_its_line_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", *[row(n, "ab"[n % 2]) for n in range(50)])
    files = find_files(str(path))
    twice = joined([look_at(cut(files, part_bytes=900), near_rows=0) for _ in range(2)])
    [finding] = report_of(twice, near_rows=0).findings
    assert (finding.kind, finding.count) == ("exact_duplicates", 50)
    assert finding.where[:2] == [f"{path}:1 is {path}:1", f"{path}:2 is {path}:2"]
