"""The trained weights as PEFT or transformers save them, and the golden outputs that every later load is compared with."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hone.errors import RunFailedError
from models.methods import METHODS, State
from models.tasks import Batch
from training.forward import Batcher
from training.model import gathered
from training.start import Started
from training.token_rows import TokenRows
from training.zero import release_gathered

GOLDEN_FILE = "golden.safetensors"
GOLDEN_ROWS = 4
GOLDEN_TOKENS = 256
NOT_TOKENS = ("content", "parts", "features")


def export(run: Started, rows: TokenRows) -> None:
    """Gather what trained and let rank 0 write it to the job's export folder, in place of what was there. Every rank takes part.

    Args:
        run: This worker's part of the run.
        rows: Some of which become the golden outputs.

    Raises:
        RunFailedError: a tensor came out empty (a naive save under ZeRO-3: https://github.com/huggingface/peft/issues/2450).
    """
    job, engine, worker = run.job, run.engine, run.worker
    golden = _golden_outputs(engine, run.batcher, rows)
    release_gathered(engine)
    method, model = METHODS[job.recipe.method.type], engine.module.model
    state = gathered_state(model, method, sharded=job.recipe.zero.stage == 3, keep=worker.rank == 0)
    if worker.rank:
        return
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise RunFailedError(f"{len(empty)} of {len(state)} trained tensors are empty ({empty[0]}, ...); nothing was published")
    staging = job.export_folder.with_name(f"{job.export_folder.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    method.save(model, job.recipe.method, state, staging)
    save_file(golden, staging / GOLDEN_FILE)
    _replace(staging, job.export_folder)


def _replace(staging: Path, folder: Path) -> None:
    """A reader finds the old files or the new ones, and after a crash between the two renames, the run's next export."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(staging, folder)
    shutil.rmtree(old, ignore_errors=True)


def gathered_state(module: Any, method: Any, *, sharded: bool, keep: bool) -> State:
    """Copies of what the method saves (and of every buffer that is saved), one at a time, on the ranks that keep them."""
    state: State = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if method.trained(name, parameter):
            with gathered([parameter], sharded=sharded):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
    if keep:
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        state |= {name: value.cpu() for name, value in module.state_dict().items() if name not in parameters}
    return state


@torch.no_grad()
def _golden_outputs(engine: Any, batcher: Batcher, rows: TokenRows) -> Batch:
    """What a few rows are as the model's inputs, and `logits` [rows, outputs] as the trained model answers now."""
    engine.eval()
    taken = [golden_row(row) for row in rows.take(np.arange(min(GOLDEN_ROWS, len(rows))))]
    batch = batcher.unpacked(taken)
    # As it is served: padded rows, while training may pack them.
    outputs = engine(batcher.batch(taken, whole=True), wants="outputs")
    kept = {name: tensor.cpu().contiguous() for name, tensor in batch.items()}
    return {**kept, "logits": outputs.float().cpu().contiguous()}


def golden_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row cut to GOLDEN_TOKENS, where it consists of tokens."""
    if "parts" in row and "content" not in row:  # a pair: the second sequence begins where the first ends
        first = int(row["parts"][0])
        cut = [slice(min(first, GOLDEN_TOKENS)), slice(first, first + GOLDEN_TOKENS)]
        joined = {name: np.concatenate([np.asarray(row[name])[part] for part in cut]) for name in ("input_ids", "labels")}
        return {**joined, "parts": [min(first, GOLDEN_TOKENS), len(joined["input_ids"]) - min(first, GOLDEN_TOKENS)]}
    is_whole = len(row["labels"]) != len(row["input_ids"])
    return {name: value if name in NOT_TOKENS or (name == "labels" and is_whole) else value[:GOLDEN_TOKENS] for name, value in row.items()}
