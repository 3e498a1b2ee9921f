"""`hone evaluate`, `hone export` and `hone methods`, as they are typed."""

import json
from pathlib import Path

import pytest

from hone.metrics import metrics_of
from hone.registry import Registry
from hone.storage import Home
from tests.runs import make_recipe, make_run, rows_for, written
from tests.unit.cluster.conftest import Hone
from training.publish import publish


@pytest.fixture
def classifier(bert: Path, tmp_path: Path) -> Path:
    """Rows, of which a published classifier, bot@1, has learnt."""
    home, rows = Home(tmp_path / ".hone"), written(tmp_path / "rows.jsonl", rows_for("text-classification"))
    publish(make_run(tmp_path / "r1", make_recipe(bert, rows, "text-classification"), home), {}, home=home)
    return rows


def test_evaluating_prints_tables_and_writes_a_report(hone: Hone, classifier: Path, tmp_path: Path) -> None:
    done = hone("evaluate", "bot", "--data", str(classifier), "--rows", "12", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "bot@1 on 12 of 24 rows" in done.stdout
    assert "base: always" in done.stdout
    for name in ("METRIC", "accuracy", "f1_macro", "ece", "WANTED \\ ANSWERED", "worsened most"):
        assert name in done.stdout, name
    assert done.stderr == "wrote out/report.html\n"
    assert (tmp_path / "out" / "report.html").is_file()


def test_evaluating_prints_json_alone(hone: Hone, classifier: Path) -> None:
    done = hone("evaluate", "bot@1", "--data", str(classifier), "--no-base", "--metrics", "f1", "--metrics", "accuracy", "--json")
    found = json.loads(done.stdout)
    assert [metric["name"] for metric in found["metrics"]] == ["accuracy", "f1_macro"]
    assert found["compared_with"] is None
    assert found["metrics"][0]["base"] is None


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "no adapter or alias 'nobody'"),
        (["bot", "--metrics", "rouge"], "--metrics rouge: task chat does not have it; it has perplexity"),
        (["bot", "--column", "text"], "--column 'text': write OURS=THEIRS"),
    ],
)
def test_a_mistake_is_one_line_and_loads_nothing(hone: Hone, arguments: list[str], said: str) -> None:
    done = hone("evaluate", *arguments, "--data", "rows.jsonl")
    assert done.returncode == 1
    assert done.stderr.startswith(f"hone: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_a_mistake_that_shows_later_is_one_line_too(hone: Hone, classifier: Path, tmp_path: Path) -> None:
    done = hone("evaluate", "bot", "--data", "nowhere.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nowhere.jsonl: no such data file" in done.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    done = hone("export", "bot@1", "--format", "merged", "--out", "full")
    assert (done.returncode, done.stderr) == (1, "hone: full: is already there and not empty; name another folder\n")
    assert hone("export", "bot@1", "--format", "gguf", "--out", "new").stderr == "hone: --format gguf: must be merged or peft\n"
    assert classifier.exists()


@pytest.mark.usefixtures("classifier")
def test_exporting_says_where(hone: Hone, tmp_path: Path) -> None:
    done = hone("export", "bot@1", "--format", "peft", "--out", "exported")
    assert (done.returncode, done.stderr) == (0, "wrote exported\n")
    assert (tmp_path / "exported" / "adapter_model.safetensors").is_file()
    assert Registry(Home(tmp_path / ".hone")).resolve("bot").version == 1


def test_methods_are_told_with_their_reasons(hone: Hone) -> None:
    done = hone("methods")
    assert "preference by full: the loss compares with the base" in done.stdout
    found = json.loads(hone("methods", "--json").stdout)
    goes = {(each["task"], each["method"]): each for each in found["goes"]}
    assert goes["chat", "lora"] == {"task": "chat", "method": "lora", "served": "mixed", "why_not": None}
    assert goes["seq2seq", "lora"]["served"] == "merged"
    assert goes["image-classification", "prompt"]["served"] is None
    assert len(goes) == len(found["methods"]) * len(found["tasks"])


def test_every_metric_of_a_task_is_known_by_name() -> None:
    assert metrics_of("seq2seq")[-1] == "rougeL"
    assert metrics_of("image-classification", "regression")[2] == "r2"
