"""What a look at the data found, as JSON and as a verdict."""

from collections.abc import Collection

from pydantic import BaseModel

SHOWN = 20
STOPPING = ("bad_rows", "leakage", "no_rows")
"""What stops a training unless the recipe says otherwise."""
MEANINGS = {
    "bad_rows": "rows that cannot be read or make no sense",
    "no_rows": "nothing to train on",
    "leakage": "rows of validation that also stand in training",
    "exact_duplicates": "rows that stand there more than once",
    "near_duplicates": "rows that are nearly another row",
    "near_leakage": "rows of validation that are nearly a row of training",
    "empty_targets": "rows with nothing to learn within max_length",
    "cut_targets": "rows whose targets max_length cuts",
    "unknown_labels": "rows of validation with a class that training never names",
    "one_label": "every row has the same class",
    "email": "rows with an e-mail address",
    "phone": "rows with a telephone number",
    "card": "rows with a payment card number",
    "secret": "rows with a password, key or token",
}
"""Every finding there is."""


class Finding(BaseModel):
    """One thing that is noteworthy, and where."""

    kind: str
    count: int
    where: list[str]
    """The first of them: `file:line`, and what is to be said of it."""


class Histogram(BaseModel):
    """How long rows are."""

    unit: str
    """tokens, or characters where no base model was named."""
    total: int
    median: int
    p95: int
    longest: int
    edges: list[int]
    counts: list[int]
    """Rows of at least `edges[n]` and less than `edges[n + 1]`."""


class Summary(BaseModel):
    """The training or the validation rows."""

    files: int
    rows: int
    formats: dict[str, int]
    """Name of a format -> rows of it."""
    lengths: Histogram | None = None
    labels: dict[str, int] | None = None


class Report(BaseModel):
    """All of it."""

    train: Summary
    validation: Summary | None = None
    findings: list[Finding]
    notes: list[str] = []
    """What was not looked at, and why."""

    def stopping(self, kinds: Collection[str] = STOPPING) -> list[Finding]:
        """The findings that are of one of these kinds."""
        return [finding for finding in self.findings if finding.kind in kinds]
