"""Exported folders load without hone, by transformers and PEFT alone, and answer as the golden outputs say."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hone.errors import RecipeError, RegistryError
from hone.storage import Home
from tests.runs import make_recipe, make_run, rows_for, written
from training.export_adapter import export_adapter
from training.export_adapter import main as export_command
from training.job import Job
from training.publish import publish

CLASSES = {"chat": "AutoModelForCausalLM", "text-classification": "AutoModelForSequenceClassification", "seq2seq": "AutoModelForSeq2SeqLM"}
ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(("hone", "models", "training", "cluster", "serving")))  # importing any of them fails
import torch, transformers
from safetensors.torch import load_file
model_class, folder, base, golden = getattr(transformers, sys.argv[1]), sys.argv[2], sys.argv[3], load_file(sys.argv[4])
wanted = golden.pop("logits")
if base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model_class.from_pretrained(base, **eval(sys.argv[5])), folder)
else:
    model = model_class.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)
names = ("input_ids", "attention_mask", "labels") if "Seq2Seq" in sys.argv[1] else ("input_ids", "attention_mask")
logits = model.eval()(**{name: golden[name] for name in names}).logits
if "Seq2Seq" in sys.argv[1]:
    logits = logits[torch.arange(len(logits)), (golden["labels"] >= 0).sum(-1) - 1]
elif "last" in golden:
    width = golden["input_ids"].shape[1]
    logits = logits[:, -width:].flatten(0, 1)[golden["last"]]  # without those of learnt vectors before the words
assert not [name for name in sys.modules if name.startswith("hone.")]
print(float((logits - wanted).abs().max()))
"""


def run_of(tmp_path: Path, base: Path, home: Home, task: str, method: str | dict[str, Any]) -> Job:
    data = written(tmp_path / "rows.jsonl", rows_for(task))
    job = make_run(tmp_path / "r1", make_recipe(base, data, task, method), home)
    publish(job, {}, home=home)
    return job


def difference(task: str, folder: Path, job: Job, *, base: Path | None = None) -> float:
    """Largest difference from the golden outputs, in a process that has nothing of hone."""
    options = {"num_labels": len(job.data.labels)} if job.data.labels else {}
    argv = [CLASSES[task], str(folder), str(base or ""), str(job.export_folder / "golden.safetensors"), repr(options)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE, *argv], capture_output=True, text=True, check=False, cwd=folder, env={"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize(
    ("task", "base", "method", "form"),
    [
        ("chat", "llama", "lora", "merged"),
        ("chat", "llama", "lora", "peft"),
        ("chat", "llama", {"type": "lora", "use_dora": True, "r": 4}, "merged"),
        ("chat", "llama", {"type": "lora", "init_lora_weights": "pissa", "r": 4}, "merged"),
        ("chat", "llama", {"type": "lora", "init_lora_weights": "pissa", "use_rslora": True, "r": 4}, "peft"),
        ("chat", "llama", "ia3", "merged"),
        ("chat", "llama", "prompt", "peft"),
        ("chat", "llama", "full", "merged"),
        ("text-classification", "bert", "lora", "merged"),
        ("text-classification", "bert", "ia3", "peft"),
        ("seq2seq", "t5", "lora", "merged"),
    ],
)
def test_an_exported_folder_loads_without_hone_and_answers_alike(
    task: str, base: str, method: str | dict[str, Any], form: str, tmp_path: Path, home: Home, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    job = run_of(tmp_path, folder, home, task, method)
    out = tmp_path / "out"
    export_adapter("bot@1", form=form, out=out, home=home)
    names = {path.name for path in out.iterdir()}
    assert not names & {"manifest.json", "recipe.json", "golden.safetensors", "evaluation.json"}
    assert names >= {"README.md", "tokenizer.json", "adapter_config.json" if form == "peft" else "config.json"}
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt")]
    assert difference(task, out, job, base=folder if form == "peft" else None) < 1e-4


@pytest.mark.parametrize(
    ("method", "form", "error", "said"),
    [
        ("adapter", "peft", RegistryError, "PEFT has no bottleneck layers, so no format for them; hone's own is the published folder"),
        ("adapter", "merged", RecipeError, "cannot be merged into them; serve it with hone"),
        ("prompt", "merged", RecipeError, "cannot be merged into them; export it as peft"),
        ("full", "peft", RegistryError, "is a whole model and no adapter.*; use --format merged"),
    ],
)
def test_a_form_that_there_is_not_is_refused_and_nothing_is_left(
    method: str, form: str, error: type[Exception], said: str, llama: Path, tmp_path: Path, home: Home
) -> None:
    run_of(tmp_path, llama, home, "chat", method)
    out = tmp_path / "exports" / "out"
    with pytest.raises(error, match=said):
        export_adapter("bot@1", form=form, out=out, home=home)
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_a_folder_that_holds_anything_is_left_alone(tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert export_command(["bot@1", "--format", "peft", "--out", str(tmp_path), "--home", str(home.root)]) == 1
    assert "is already there and not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
