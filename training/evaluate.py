"""Loss and accuracy on a whole data set, shared out over the workers."""

from typing import Any

import torch

from training.batches import evaluation_batches
from training.data import TokenRows
from training.forward import make_batch, sum_over_workers
from training.job import Job
from training.tasks import Task
from training.worker import Worker


@torch.no_grad()
def evaluate(engine: Any, rows: TokenRows, task: Task, job: Job, worker: Worker) -> dict[str, float]:
    """`eval_loss` (mean cross entropy over targets) and `eval_<accuracy_name>`, the same on every rank."""
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    batch_size = 2 * job.recipe.train.micro_batch_size  # no gradients to hold
    for portion in evaluation_batches(rows.lengths, rank=worker.rank, world_size=worker.world_size, batch_size=batch_size):
        batch = make_batch(rows, portion, task, pad_token_id=job.data.pad_token_id, device=engine.device)
        loss, correct = task.loss(engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch)
        totals += torch.stack([loss, correct, loss.new_tensor(rows.n_targets[portion].sum())]).to(totals)
    loss_sum, right, n_targets = sum_over_workers(totals, device=engine.device, worker=worker).tolist()
    return {"eval_loss": loss_sum / n_targets, f"eval_{task.accuracy_name}": right / n_targets}
