"""A job: the resolved recipe and what was prepared for it. Written once to the run folder; workers see only that."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from hone.manifest import BaseModelId
from hone.recipe import Recipe
from hone.storage import write_text

JOB_FILE = "job.json"
METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
FAILURE_FILE = "failure.json"
EXPORT_FOLDER = "export"


class PreparedData(BaseModel):
    """Tokenised rows on disk, ready to be memory-mapped."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    digest: str
    train_rows: int
    validation_rows: int
    cut_rows: int
    """Training rows longer than max_length, cut at its end."""
    dropped_rows: int
    """Training rows with no target left within max_length."""
    formats: list[str]
    """How the rows were written, the commonest first."""
    bad_rows: int
    """Rows left out because something was wrong with them."""
    findings: dict[str, int]
    """What the gate found, and how often; report.json beside the rows says where."""
    pad_token_id: int
    labels: list[str] | None = None

    @property
    def train_file(self) -> Path:
        return self.folder / "train.arrow"

    @property
    def validation_file(self) -> Path:
        return self.folder / "validation.arrow"


class Job(BaseModel):
    """One training run."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    folder: Path
    recipe: Recipe
    base_folder: Path
    base_id: BaseModelId
    data: PreparedData
    use_gpu: bool
    resources_per_worker: dict[str, float]

    @property
    def export_folder(self) -> Path:
        """Where rank 0 leaves the trained weights and the golden outputs."""
        return self.folder / EXPORT_FOLDER

    def save(self) -> None:
        write_text(self.folder / JOB_FILE, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Job":
        return cls.model_validate_json((folder / JOB_FILE).read_bytes())
