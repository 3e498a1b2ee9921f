"""`python -m training.check RUN_FOLDER`: does what was saved answer as it did when it was trained?

Run in a process of its own, with nothing of the training left in memory: plain transformers and PEFT load the exported folder, and its
logits on the golden rows are compared with those that the workers recorded.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from training.export import GOLDEN_FILE
from training.job import Job
from training.model import choose_dtype
from training.tasks import TASKS

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Largest difference of a logit, relative to the spread of its row: a few roundings of the type, far from a lost tensor's effect."""


@torch.no_grad()
def difference(job: Job) -> float:
    """Largest logit difference between the reloaded model and the golden outputs, relative to the row's standard deviation."""
    golden = load_file(job.export_folder / GOLDEN_FILE)
    device = torch.device("cuda" if job.use_gpu and torch.cuda.is_available() else "cpu")
    task = TASKS[job.recipe.task]
    whole = job.recipe.method.type == "full"
    source = job.export_folder if whole else job.base_folder
    dtype = choose_dtype(job.recipe, use_gpu=job.use_gpu)
    model, _ = task.load_model(source, labels=job.data.labels, dtype=dtype, pad_token_id=job.data.pad_token_id)
    if not whole:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(job.export_folder), autocast_adapter_dtype=False)
    model = model.to(device, dtype).eval()
    each = zip(golden["input_ids"], golden["attention_mask"], strict=True)
    present = [ids[mask.bool()].numpy() for ids, mask in each]
    rows = [{"input_ids": ids, "labels": np.full_like(ids, -100)} for ids in present]
    batch = task.collate(rows, pad_token_id=job.data.pad_token_id, packed=False)
    answered = task.outputs(model, {name: tensor.to(device) for name, tensor in batch.items()}).float().cpu()
    spread = golden["logits"].std(-1, keepdim=True).clamp_min(1e-6)
    return float(((answered - golden["logits"]) / spread).abs().max())


def main() -> None:
    """Print the difference; exit 1 where it is above what the number type explains."""
    job = Job.load(Path(sys.argv[1]))
    found, allowed = difference(job), TOLERANCE[choose_dtype(job.recipe, use_gpu=job.use_gpu)]
    print(f"largest difference from training: {found:.2e} (allowed {allowed:.0e})")  # noqa: T201 - what this program is for
    sys.exit(not found <= allowed)


if __name__ == "__main__":
    main()
