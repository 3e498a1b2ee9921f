"""`python -m training.check RUN_FOLDER`: does what was saved answer as it did when it was trained, and how well?

Run in a process of its own, with nothing of the training left in memory: the exported folder is loaded beside the base, and its logits
on the golden rows are compared with those that the workers recorded. Then it is evaluated on the validation rows, and the report is made.
"""

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from models.tasks import TASKS
from training.evaluation.after import evaluate_run
from training.evaluation.evaluate import best_device
from training.evaluation.places import NOT_EVALUATED
from training.export import GOLDEN_FILE
from training.job import Job
from training.model import choose_dtype, load_trained
from training.trained import trained_by

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference of a logit, relative to the spread of its row: a few roundings of the type, far from a lost tensor's effect."""


DIFFERS = 1


@torch.no_grad()
def difference(job: Job, model: Any = None) -> float:
    """Largest logit difference between the reloaded model and the golden outputs, relative to the row's standard deviation."""
    golden = load_file(job.export_folder / GOLDEN_FILE)
    device = best_device(use_gpu=job.use_gpu)
    if model is None:
        model = load_trained(job, job.export_folder, dtype=choose_dtype(job.recipe, use_gpu=job.use_gpu)).to(device)
    batch = {name: tensor.to(device) for name, tensor in golden.items() if name != "logits"}
    answered, wanted = TASKS[job.recipe.task].outputs(model, batch).float().cpu(), golden["logits"]
    # A head with one output has no spread in a row; what all rows answer has.
    spread = wanted.std(-1, keepdim=True) if wanted.shape[1] > 1 else (wanted.std() if len(wanted) > 1 else wanted.abs())
    return float(((answered - wanted) / spread.clamp_min(1e-6)).abs().max())


def main() -> int:
    """Print the difference; an exit code that is not 0 where it is above what the number type explains, or there is no report."""
    job = Job.load(Path(sys.argv[1]))
    trained = trained_by(job)
    model, fresh = trained.load()
    model.to(best_device(use_gpu=job.use_gpu))
    found, allowed = difference(job, model), TOLERANCE[trained.dtype]
    print(f"largest difference from training: {found:.2e} (allowed {allowed:.0e})", flush=True)  # noqa: T201 - what this program is for
    if not found <= allowed:
        return DIFFERS
    try:
        evaluate_run(job, model, fresh)
    except Exception as error:  # hours of training are not thrown away for want of a report
        traceback.print_exc()
        print(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")  # noqa: T201
        return NOT_EVALUATED
    return 0


if __name__ == "__main__":
    sys.exit(main())
