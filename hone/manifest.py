"""What a published adapter says of itself: where it came from, what it holds, and the digests that prove it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from hone.ids import AdapterRef
from hone.methods import MethodName, Served
from hone.storage import digest_of
from hone.tasks import TaskName

MANIFEST_FILE = "manifest.json"
RECIPE_FILE = "recipe.json"
"""Beside it: the resolved recipe."""
EVALUATION_FILE = "evaluation.json"
"""Beside it: the metrics of the exported weights with their intervals, where there were validation rows."""
VERDICT_FILE = "verdict.json"
REPORT_FILE = "report.html"
PLOTS = "plot_*.png"
CARD_FILE = "README.md"
TOLD = (RECIPE_FILE, EVALUATION_FILE, VERDICT_FILE, REPORT_FILE, PLOTS, CARD_FILE)
"""What tells people how a version came to be, other in each; what answers by the version reads none of it."""


class BaseModelId(BaseModel):
    """Which base model, to the byte: `fingerprint` is what counts, the name is for people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revision: str | None = None
    fingerprint: str


class FileEntry(BaseModel):
    """One file of an adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    bytes: int


class Lineage(BaseModel):
    """What made the adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    data_digest: str
    hone_version: str
    parent_run_id: str | None = None
    trial: dict[str, Any] | None = None
    """The search trial that won: its id, its sampled values and how many it beat."""
    folds: dict[str, Any] | None = None
    """What cross-validation came to before the training on everything: mean, deviation and interval of each metric."""


class AdapterManifest(BaseModel):
    """`manifest.json`, written last: an adapter without one does not exist."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = 2
    name: str
    version: int
    kind: Literal["adapter", "full"]
    """`adapter`: weights to put beside the base. `full`: a whole model, served as a base of its own."""
    method: MethodName
    served: Served
    """In one batch with others, merged, alone, or as a base; see hone.methods."""
    task: TaskName
    base: BaseModelId
    dtype: str
    labels: list[str] | None = None
    """Class names in the order of the head's outputs."""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """What a classifier answers: one class, any number of classes, or a number."""
    metrics: dict[str, float]
    lineage: Lineage
    created_at: str
    files: dict[str, FileEntry]

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.name, self.version)

    @property
    def digest(self) -> str:
        """Identity of the content: the same files on the same base have the same digest, under any name or version."""
        return digest_of({"base": self.base.fingerprint, "files": {k: v.sha256 for k, v in self.files.items()}})
