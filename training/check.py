"""`python -m training.check RUN_FOLDER`: does what was saved answer as it did when it was trained?

Run in a process of its own, with nothing of the training left in memory: the exported folder is loaded beside the base, and its logits
on the golden rows are compared with those that the workers recorded.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from models.tasks import TASKS
from training.export import GOLDEN_FILE
from training.job import Job
from training.model import choose_dtype, load_trained

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Largest difference of a logit, relative to the spread of its row: a few roundings of the type, far from a lost tensor's effect."""


@torch.no_grad()
def difference(job: Job) -> float:
    """Largest logit difference between the reloaded model and the golden outputs, relative to the row's standard deviation."""
    golden = load_file(job.export_folder / GOLDEN_FILE)
    device = torch.device("cuda" if job.use_gpu and torch.cuda.is_available() else "cpu")
    model = load_trained(job, job.export_folder, dtype=choose_dtype(job.recipe, use_gpu=job.use_gpu)).to(device)
    batch = {name: tensor.to(device) for name, tensor in golden.items() if name != "logits"}
    answered, wanted = TASKS[job.recipe.task].outputs(model, batch).float().cpu(), golden["logits"]
    # A head with one output has no spread in a row; what all rows answer has.
    spread = wanted.std(-1, keepdim=True) if wanted.shape[1] > 1 else (wanted.std() if len(wanted) > 1 else wanted.abs())
    return float(((answered - wanted) / spread.clamp_min(1e-6)).abs().max())


def main() -> None:
    """Print the difference; exit 1 where it is above what the number type explains."""
    job = Job.load(Path(sys.argv[1]))
    found, allowed = difference(job), TOLERANCE[choose_dtype(job.recipe, use_gpu=job.use_gpu)]
    print(f"largest difference from training: {found:.2e} (allowed {allowed:.0e})")  # noqa: T201 - what this program is for
    sys.exit(not found <= allowed)


if __name__ == "__main__":
    main()
