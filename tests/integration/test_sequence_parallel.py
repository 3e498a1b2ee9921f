"""Workers that share each sequence follow one plain process, step by step, and go on from each other's checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.errors import RecipeError
from hone.recipe import with_overrides
from hone.run_folder import attempts, read_events, read_metrics
from hone.storage import Home
from tests.disturbed import losses_of, proof_of
from tests.integration.test_zero_stages import assert_same_steps, recipe, write_chats
from tests.tiny import make_decoder
from tests.zero_matrix import failure, prepared, train_all
from training.job import Job
from training.launch import fit, prepare_job

ALL = bool(os.environ.get("HONE_TEST_HEAVY"))
STEPS = 20
FULL = {"optim": {"learning_rate": 1e-3}}
LORA, WHOLE = {"type": "lora"}, {"type": "full"}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{base}, lora, {stage}": {"base": base, "method": LORA, "stage": stage}
        for base in ("llama", "qwen3", "gemma3")
        for stage in (0, 2, 3)
    },
    **{
        f"{base}, full, {stage}": {"base": base, "method": WHOLE, "stage": stage, **FULL}
        for base in ("llama", "qwen3")
        for stage in (0, 2, 3)
    },
    "llama, full, 1": {"base": "llama", "method": WHOLE, "stage": 1, **FULL},
    "llama, full, 3, recomputed": {"base": "llama", "method": WHOLE, "stage": 3, **FULL, "train": {"gradient_checkpointing": True}},
    "llama, lora, 2, offloaded": {"base": "llama", "method": LORA, "stage": 2, "zero": {"offload_optimizer": True}},
    "qwen3, freeze, 2": {"base": "qwen3", "method": {"type": "freeze", "freeze_layers": 1}, "stage": 2, **FULL},
    "qwen3, ia3, 2": {"base": "qwen3", "method": {"type": "ia3"}, "stage": 2},
    "qwen3, adapter, 3": {"base": "qwen3", "method": {"type": "adapter"}, "stage": 3},
}
SOME = ["llama, lora, 0", "llama, full, 2", "qwen3, full, 0", "gemma3, lora, 2", "qwen3, lora, 3", "llama, full, 3, recomputed"]
"""What is tried in every run of the tests; `make test-heavy` tries all."""
NO_NUMBER = "no number"


@pytest.fixture(scope="module")
def bases(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "llama": llama,
        "qwen3": make_decoder(tmp_path_factory.mktemp("qwen3"), "qwen3"),
        "gemma3": make_decoder(tmp_path_factory.mktemp("gemma3"), "gemma3_text", **window),
        NO_NUMBER: without_number(llama, tmp_path_factory.mktemp("nan")),
    }


def without_number(base: Path, folder: Path) -> Path:
    """A base that has no numbers for the token "~"."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("~")] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("rows") / "chat.jsonl")


def make(folder: Path, base: Path, rows: Path, *, home: Home, workers: int = 2, size: int = 2, also: dict[str, Any], **case: Any) -> Job:
    shared = {"scaling.num_workers": workers, "scaling.sequence_parallel_size": size}
    return prepared(with_overrides(recipe(base, rows, task="chat", **case), {**shared, **also}), folder, home=home)


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All of them, by one pair of workers."""
    root = tmp_path_factory.mktemp("shared")
    one_bad = root / "one-bad.jsonl"
    one_bad.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "~" if n == 6 else "six"}) + "\n" for n in range(16)))
    also = {"data.validation_fraction": 0.0, "train.global_batch_size": 16}
    jobs = {NO_NUMBER: make(root / "bad", bases[NO_NUMBER], one_bad, home=Home(root / "home"), also=also, method=LORA, stage=3)}
    for n, (name, case) in enumerate(CASES.items()):
        if ALL or name in SOME:
            about = {**case, "base": bases[case["base"]]}
            jobs[name] = make(root / str(n), about.pop("base"), rows, home=Home(root / "home"), also={}, **about)
    train_all(root, list(jobs.values()), timeout_s=400)
    return jobs


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CASES if ALL else SOME)
def test_two_workers_to_a_sequence_follow_one_plain_process(runs: dict[str, Job], name: str) -> None:
    assert not failure(runs[name])
    assert_same_steps(runs[name])
    proof = proof_of(runs[name].folder)
    assert (proof.steps, proof.wrong) == (STEPS, [])
    assert proof.rows == sum(m["rows"] for m in read_metrics(runs[name].folder) if "rows" in m), "a row counts once, whoever shares it"


PARTS = (((1, 1, 7), (2, 2, 0)), *([((2, 2, 7), (1, 1, 7), (4, 2, 0)), ((4, 4, 9), (1, 1, 0))] if ALL else []))
"""Workers, how many share a sequence, and after how many steps they are gone; each has a checkpoint of the step before."""
KEPT: dict[str, dict[str, Any]] = {
    "lora, 3": {"method": LORA, "stage": 3, "train": {"ema_decay": 0.9}},
    "full, 2": {"method": WHOLE, "stage": 2, **FULL},
    **({"lora, 2": {"method": LORA, "stage": 2}, "full, 0": {"method": WHOLE, "stage": 0, **FULL}} if ALL else {}),
}
MEASURED = ("eval_loss", "eval_token_accuracy", "retain_loss", "retain_kl")


@pytest.fixture(scope="module", params=range(len(PARTS)), ids=str)
def disturbed(
    request: pytest.FixtureRequest, llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Job, ...]]:
    """Runs with validation, replay and a penalty towards the base: by one worker, and by other ones in turn that share sequences."""
    root = tmp_path_factory.mktemp("parts")
    general = root / "general.jsonl"
    general.write_text(
        "".join(json.dumps({"prompt": f"tell me {n}", "completion": "green hills " * (n % 5 + 1)}) + "\n" for n in range(24))
    )
    also = {"data.retain": str(general), "guard.kl_penalty": 0.1, "train.save_steps": 100, "train.eval_steps": 5, "guard.publish": "last"}
    jobs = {}
    for name, case in KEPT.items():
        about = {**case, "home": Home(root / "home"), "also": also, "workers": 1, "size": 1}
        jobs[name] = tuple(make(root / f"{name} {which}", llama, rows, **about) for which in ("whole", "parts"))
    for workers, size, steps in PARTS[request.param]:
        parts = [shared(job, workers=workers, size=size) for _, job in jobs.values()]
        wholes = [whole for whole, _ in jobs.values()] if workers == 1 else []
        train_all(root, [*parts, *wholes], timeout_s=800 if ALL else 400, workers=workers, steps=[steps] * len(parts) + [0] * len(wholes))
        for job in parts:
            assert not failure(job, workers=workers)
    return {name: (whole, Job.load(parts.folder)) for name, (whole, parts) in jobs.items()}


def shared(job: Job, *, workers: int, size: int) -> Job:
    """A run as it is resumed with so many workers, of which so many share a sequence."""
    overrides = {"scaling.num_workers": workers, "scaling.sequence_parallel_size": size}
    made = job.model_copy(update={"recipe": with_overrides(job.recipe, overrides)})
    made.save()
    return made


@pytest.mark.parametrize("name", KEPT)
def test_a_run_goes_on_with_other_workers_to_a_sequence(disturbed: dict[str, tuple[Job, ...]], name: str) -> None:
    whole, parts = disturbed[name]
    expected, found = (read_metrics(job.folder) for job in (whole, parts))
    for metric in ("loss", "kl", *MEASURED):
        first, second = ([(m["step"], m[metric]) for m in lines if metric in m] for lines in (expected, found))
        assert [step for step, _ in second] == [step for step, _ in first]
        assert [value for _, value in second] == pytest.approx([value for _, value in first], abs=1e-5), metric
    assert abs(losses_of(whole.folder)[1] - losses_of(whole.folder)[STEPS]) > 0.02, "nothing was learnt, so equality shows nothing"
    proof = proof_of(parts.folder)
    assert (proof.steps, proof.wrong) == (STEPS, [])
    assert len({(a.world_size, a.sequence_parallel_size) for a in attempts(parts.folder)}) > 1


def test_a_loss_that_is_no_number_is_told_by_all_that_share_it(runs: dict[str, Job]) -> None:
    said = failure(runs[NO_NUMBER])
    assert "step 1: the loss is not a finite number on " in said
    assert "one-bad.jsonl:7;" in said


def test_a_base_whose_heads_do_not_divide_is_refused_before_a_run_is_made(llama: Path, rows: Path, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with pytest.raises(RecipeError, match=r"sequence_parallel_size 3 .*: its 4 attention heads do not divide among 3 workers"):
        make(tmp_path / "run", llama, rows, home=home, workers=3, size=3, also={"train.global_batch_size": 9}, method=LORA, stage=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not ALL, reason="takes a minute: make test-heavy")
def test_an_uneven_number_of_workers_is_made_even(llama: Path, rows: Path, home: Home) -> None:
    """Room for three of two to four workers: Ray starts three, and two of them can share sequences."""
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        made = recipe(llama, rows, task="chat", method=LORA, stage=2)
        shared = {"scaling.num_workers": [2, 4], "scaling.sequence_parallel_size": 2}
        job = prepare_job(with_overrides(made, shared), home=home, run_id="r1")
        fit(job)
    finally:
        ray.shutdown()
    assert [e["world_size"] for e in read_events(job.folder) if e["event"] == "workers_began"] == [3, 2]
    assert_same_steps(job)
    assert proof_of(job.folder).wrong == []
