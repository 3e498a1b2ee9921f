"""The trained weights as PEFT or transformers save them, and the golden outputs that every later load is compared with."""

from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hone.errors import RunFailedError
from training.forward import Batcher
from training.job import Job
from training.model import gathered
from training.tasks.task import pad
from training.token_rows import TokenRows
from training.worker import Worker

GOLDEN_FILE = "golden.safetensors"
GOLDEN_ROWS = 4
GOLDEN_TOKENS = 256


def export(engine: Any, job: Job, batcher: Batcher, rows: TokenRows, worker: Worker) -> None:
    """Gather what trained and let rank 0 write it to `job.export_folder`. Every rank takes part.

    Raises:
        RunFailedError: a tensor came out empty (a naive save under ZeRO-3: https://github.com/huggingface/peft/issues/2450).
    """
    golden = _golden_outputs(engine, job, batcher, rows)
    state = _gathered_state(engine.module.model, sharded=job.recipe.zero.stage == 3, keep=worker.rank == 0)
    if worker.rank:
        return
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise RunFailedError(f"{len(empty)} of {len(state)} trained tensors are empty ({empty[0]}, ...); nothing was published")
    job.export_folder.mkdir(exist_ok=True)
    engine.module.model.save_pretrained(job.export_folder, state_dict=state, **_peft_options(job))
    save_file(golden, job.export_folder / GOLDEN_FILE)


def _peft_options(job: Job) -> dict[str, Any]:
    # "auto" would look for the base on the hub, to see whether its vocabulary grew.
    return {} if job.recipe.method.type == "full" else {"save_embedding_layers": False}


def _gathered_state(module: Any, *, sharded: bool, keep: bool) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters (and of every buffer that is saved), one at a time, on the ranks that keep them."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            with gathered([parameter], sharded=sharded):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
    if keep:
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        state |= {name: value.cpu() for name, value in module.state_dict().items() if name not in parameters}
    return state


@torch.no_grad()
def _golden_outputs(engine: Any, job: Job, batcher: Batcher, rows: TokenRows) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [rows, length], logits [rows, outputs] of a few rows, as the trained model answers now."""
    engine.eval()
    taken = [{name: row[name][:GOLDEN_TOKENS] for name in row} for row in rows.take(np.arange(min(GOLDEN_ROWS, len(rows))))]
    outputs = engine(batcher.batch(taken), wants_outputs=True)
    return {**pad(taken, job.data.pad_token_id), "logits": outputs.float().cpu().contiguous()}
