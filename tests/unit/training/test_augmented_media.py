"""Pictures and sounds that change each time they are seen, from the prepared rows to the tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hone.recipe import parse_recipe
from hone.storage import Home
from models.tasks import TASKS
from tests.samples import write_sample
from tests.tiny import make_ast, make_vit
from tests.zero_matrix import prepared
from training.augmented import augmented
from training.job import Job
from training.start import inputs_of
from training.token_rows import TokenRows


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("media")
    bases = {"image": make_vit(tmp_path_factory.mktemp("vit")), "audio": make_ast(tmp_path_factory.mktemp("ast"))}
    files = {kind: write_sample(root, f"{kind}-classification", rows=12) for kind in bases}

    def make(kind: str, name: str, **augment: Any) -> Job:
        tree = {
            "name": "media",
            "task": f"{kind}-classification",
            "base": str(bases[kind]),
            "data": {"train": str(files[kind]), "validation_fraction": 0, "augment": {kind: augment} if augment else {}, "stop_on": []},
        }
        return prepared(parse_recipe(tree, where="test"), root / f"{kind}-{name}", home=Home(root / "home"))

    return make


def batch(job: Job, step: int) -> torch.Tensor:
    rows, inputs = TokenRows(job.data, "train"), inputs_of(job)
    taken = augmented(rows, job, inputs)(step, np.arange(len(rows)))
    made = TASKS[job.recipe.task].collate(taken, inputs=inputs, packed=False)
    return next(value for name, value in made.items() if name != "labels")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("image", {"flip": 0.5, "crop_scale": [0.5, 1.0], "hue": 0.1}),
        ("audio", {"noise_snr_db": [5, 20], "time_masks": 2, "time_mask_frames": 6}),
    ],
)
def test_rows_change_by_seed_and_step_and_keep_their_shape(jobs: Any, kind: str, settings: dict[str, Any]) -> None:
    job, plain = jobs(kind, "changed", **settings), jobs(kind, "plain")
    first, again, other, before = batch(job, 0), batch(job, 0), batch(job, 1), batch(plain, 0)
    assert torch.equal(first, again)
    assert first.shape == other.shape == before.shape
    assert not torch.equal(first, other)
    assert not torch.equal(first, before)
    assert torch.isfinite(first).all()


def test_pictures_and_sounds_are_what_their_own_processors_make(jobs: Any) -> None:
    """As one asks transformers for it, file by file."""
    import io

    import pyarrow.parquet as pq
    import soundfile
    import soxr
    from PIL import Image

    for kind in ("image", "audio"):
        job = jobs(kind, "own")
        task, inputs = TASKS[job.recipe.task], inputs_of(job)
        rows = pq.read_table(Path(str(job.recipe.data.train))).column(kind).to_pylist()
        if kind == "image":
            wanted = inputs.processor([Image.open(io.BytesIO(row)).convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        else:
            sounds = [soxr.resample(soundfile.read(io.BytesIO(row), dtype="float32")[0], 8000, 16000) for row in rows]
            wanted = torch.cat([inputs.processor(s, sampling_rate=16000, return_tensors="pt")["input_values"] for s in sounds])
        tokens = TokenRows(job.data, "train")
        found = task.collate(tokens.take(np.arange(len(tokens))), inputs=inputs, packed=False)
        torch.testing.assert_close(next(v for name, v in found.items() if name != "labels"), wanted, atol=2e-3, rtol=2e-3)


def test_a_long_sound_is_cut_and_said_to_be(jobs: Any) -> None:
    job = jobs("audio", "plain2")
    short = job.recipe.model_copy(update={"data": job.recipe.data.model_copy(update={"max_seconds": 0.1})})
    made = prepared(short, job.folder.with_name("short"), home=Home(job.folder.parent / "home"))
    assert made.data.cut_rows == 12
    assert {len(row["content"]) // 4 for row in TokenRows(made.data, "train").take(np.arange(12))} == {1600}
