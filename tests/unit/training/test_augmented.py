"""Training rows that change: as the recipe says, by the seed and the step alone, and never those of validation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hone.base_model import find_base_model
from hone.recipe import parse_recipe
from hone.storage import Home
from models.tasks import Inputs
from models.tasks.tokenizer import load_tokenizer
from training.augmented import augmented
from training.data import prepare_data
from training.job import Job
from training.token_rows import TokenRows

TEXT = "the cat sat on the mat and saw the dog run over the hill"


@pytest.fixture
def jobs(bert: Path, tmp_path: Path, home: Home) -> Any:
    """Makes a job whose recipe augments so."""
    base = find_base_model(str(bert), home=home)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{TEXT} {n}", "label": "ab"[n % 2]}) + "\n" for n in range(40)))

    def make(**text: float) -> Job:
        data: dict[str, Any] = {"train": str(path), "validation_fraction": 0.2, "max_length": 48, "near_duplicate_rows": 0}
        if text:
            data["augment"] = {"text": text}
        tree = {"name": "bot", "task": "text-classification", "base": str(bert), "data": data}
        recipe = parse_recipe(tree, where="test")
        data_made = prepare_data(recipe, base, home=home)
        made: dict[str, Any] = {"run_id": "r", "folder": tmp_path, "base_folder": base.folder, "base_id": base.id, "use_gpu": False}
        return Job(**made, recipe=recipe, data=data_made, resources_per_worker={})

    return make


def taken(job: Job, step: int) -> list[list[int]]:
    rows = TokenRows(job.data, "train")
    return [row["input_ids"].tolist() for row in augmented(rows, job, Inputs())(step, np.arange(len(rows)))]


def test_the_seed_and_the_step_decide(jobs: Any) -> None:
    job = jobs(probability=1.0, word_dropout=0.3)
    assert taken(job, 3) == taken(job, 3)
    assert taken(job, 3) != taken(job, 4)


def test_without_it_rows_are_as_they_were_prepared(jobs: Any) -> None:
    plain = jobs()
    rows = TokenRows(plain.data, "train")
    as_prepared = [row["input_ids"].tolist() for row in rows.take(np.arange(len(rows)))]
    assert taken(plain, 0) == as_prepared
    assert taken(jobs(probability=0.0), 0) == as_prepared
    assert taken(jobs(probability=1.0, word_dropout=0, word_swap=0, case_noise=0), 0) == as_prepared


def test_so_many_texts_change_and_lose_so_many_words(jobs: Any) -> None:
    job = jobs(probability=0.5, word_dropout=0.4, word_swap=0, case_noise=0)
    tokenizer = load_tokenizer(job.base_folder)
    plain, changed = taken(jobs(), 0), [row for step in range(20) for row in taken(job, step)]
    n_changed = sum(row not in plain for row in changed)
    words = [len(tokenizer.decode(row, skip_special_tokens=True).split()) for row in changed if row not in plain]
    assert 0.4 < n_changed / len(changed) < 0.6
    assert 0.5 < np.mean(words) / len(f"{TEXT} 1".split()) < 0.7


def test_classes_and_validation_rows_stay(jobs: Any) -> None:
    job, plain = jobs(probability=1.0, word_dropout=0.5), jobs()
    rows = TokenRows(job.data, "train")
    numbers = np.arange(len(rows))
    given = augmented(rows, job, Inputs())(5, numbers)
    assert [row["labels"][0] for row in given] == [row["labels"][0] for row in TokenRows(plain.data, "train").take(numbers)]
    held = [TokenRows(each.data, "validation").take(np.arange(8)) for each in (job, plain)]
    assert [row["input_ids"].tolist() for row in held[0]] == [row["input_ids"].tolist() for row in held[1]]
