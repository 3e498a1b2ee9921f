"""A job: the resolved recipe and what was prepared for it. Written once to the run folder; workers see only that."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from hone.folder import Folder
from hone.manifest import BaseModelId
from hone.recipe import Recipe
from hone.run_folder import CHECKPOINTS_FOLDER, EXPORT_FOLDER, JOB_FILE
from hone.storage import write_text
from models.tasks import Head
from models.tasks.task import ProblemType


class SourceRows(BaseModel):
    """Training rows of one source."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: str
    """train, mix or retain."""
    rows: int
    per_epoch: int
    """How many rows of it an epoch sees."""


class PreparedData(BaseModel):
    """Tokenised rows on disk, ready to be memory-mapped."""

    model_config = ConfigDict(frozen=True)

    folder: Path = Path()
    shards: list[Path] = []
    """Tokens of all rows, of training and validation; train.npy and validation.npy in the folder number those of each."""
    digest: str
    train_rows: int
    validation_rows: int
    sources: list[SourceRows] = []
    """Where the training rows are from, in the order in which train.npy numbers them."""
    cut_rows: int
    """Rows whose targets max_length cuts."""
    dropped_rows: int
    """Training rows with no target left within max_length."""
    formats: list[str]
    """How the rows were written, the commonest first."""
    bad_rows: int
    """Rows left out because something was wrong with them."""
    findings: dict[str, int]
    """What the gate found, and how often; report.json beside the rows says where."""
    pad_token_id: int
    max_length: int
    """Tokens a row, at most: the recipe's, or the base's where that is less; of a sound, milliseconds."""
    labels: list[str] | None = None
    """Class names, in the order of the head's outputs."""
    problem_type: ProblemType | None = None
    retain_rows: int = 0
    """Rows of `retain` that are held out to measure."""
    notes: list[str] = []
    """What else the user should know."""


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
    def head(self) -> Head:
        """What a new head answers."""
        return Head(self.data.labels, self.data.problem_type)

    @property
    def export_folder(self) -> Path:
        """Where rank 0 leaves the trained weights and the golden outputs."""
        return self.folder / EXPORT_FOLDER

    @property
    def checkpoints(self) -> Folder:
        """Where its checkpoints are."""
        uri = self.recipe.checkpoints.uri
        return Folder(uri).below(self.run_id) if uri else Folder(self.folder / CHECKPOINTS_FOLDER)

    def save(self) -> None:
        write_text(self.folder / JOB_FILE, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Job":
        return cls.model_validate_json((folder / JOB_FILE).read_bytes())
