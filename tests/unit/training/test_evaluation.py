"""Evaluating what was trained: every task beside its base, the files that are left, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from hone.errors import BaseModelError, DataError, RecipeError
from hone.metrics import METRICS, chosen_metrics, metrics_of
from hone.storage import Home
from hone.tasks import TaskName
from models.methods import METHODS
from models.tasks import TASKS, LossOptions
from tests.runs import lines, make_recipe, make_run, rows_for, written
from training.check import difference
from training.check import main as check
from training.evaluation.__main__ import main as evaluate_command
from training.evaluation.after import write_found
from training.evaluation.evaluate import Found, Options, evaluate
from training.evaluation.metrics import measures
from training.evaluation.plots import plots
from training.evaluation.result import Estimate, read_evaluation
from training.evaluation.rows import rows_of
from training.evaluation.table import read_predictions, write_predictions
from training.evaluation.watch import unwatched
from training.job import Job
from training.publish import publish
from training.token_rows import TokenRows
from training.trained import published, trained_by

TASKS_WITH_BASES = [
    ("chat", "llama"),
    ("completion", "llama"),
    ("preference", "llama"),
    ("text-classification", "bert"),
    ("token-classification", "bert"),
    ("seq2seq", "t5"),
]


def run_of(tmp_path: Path, base: Path, home: Home, task: str, method: str = "lora", **sections: Any) -> Job:
    data = written(tmp_path / "rows.jsonl", sections.pop("rows", None) or rows_for(task))
    return make_run(tmp_path / "r1", make_recipe(base, data, task, method, **sections), home)


def found_of(job: Job, **options: Any) -> Found:
    trained = trained_by(job)
    model, fresh = trained.load()
    return evaluate(trained, model, TokenRows(job.data, "validation"), fresh=fresh, options=Options(written_tokens=8, **options))


@pytest.mark.parametrize(("task", "base"), TASKS_WITH_BASES)
def test_every_task_is_evaluated_beside_its_base(
    task: TaskName, base: str, tmp_path: Path, home: Home, request: pytest.FixtureRequest
) -> None:
    job = run_of(tmp_path, request.getfixturevalue(base), home, task)
    evaluation = found_of(job, written_rows=4).evaluation
    assert tuple(metric.name for metric in evaluation.metrics) == metrics_of(task, job.data.problem_type)
    assert evaluation.rows == job.data.validation_rows
    assert evaluation.compared_with
    for metric in evaluation.metrics:
        assert metric.tuned.low <= metric.tuned.high
        assert (metric.base is None) == (metric.name in ("reward_accuracy", "reward_margin", "ece"))
    assert evaluation.written_rows == (4 if any(METRICS[m.name].generates for m in evaluation.metrics) else 0)


@pytest.mark.parametrize(("task", "base"), TASKS_WITH_BASES)
def test_the_loss_is_the_one_that_training_measures(
    task: str, base: str, tmp_path: Path, home: Home, request: pytest.FixtureRequest
) -> None:
    job = run_of(tmp_path, request.getfixturevalue(base), home, task)
    trained, rows = trained_by(job), TokenRows(job.data, "validation")
    model, _ = trained.load()
    batch = trained.task.collate(rows.take(np.arange(len(rows))), inputs=trained.inputs(), packed=False)
    options = LossOptions(base=lambda: METHODS["lora"].off(model), beta=job.recipe.preference.beta)
    with torch.no_grad():
        summed, sums = TASKS[task].loss(model, batch, options)
    metrics = {m.name: m.tuned.value for m in found_of(job, written_rows=0).evaluation.metrics}
    assert metrics["loss"] == pytest.approx(float(summed) / int(rows.n_targets.sum()), rel=1e-4)
    for name in set(sums) & set(metrics):
        assert metrics[name] == pytest.approx(float(sums[name]) / int(rows.n_targets.sum()), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "ia3", "adapter", "prompt", "prefix"])
def test_every_method_has_its_base_to_compare_with(method: str, llama: Path, tmp_path: Path, home: Home) -> None:
    job = run_of(tmp_path, llama, home, "chat", method)
    found = found_of(job, written_rows=2)
    assert found.base is not None
    other = tmp_path / "other"
    other.mkdir()
    data = written(other / "rows.jsonl", rows_for("chat"))
    unmoved = make_run(other / "r1", make_recipe(llama, data, "chat", "lora"), home, moved=0.0)
    plain = found_of(unmoved, written_rows=2)
    assert found.base.loss == pytest.approx(plain.tuned.loss, rel=1e-4)
    assert np.abs(found.base.loss - found.tuned.loss).max() > 1e-4


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda n: {"labels": [["cat"], ["cat", "dog"], []][n % 3]}, ("f1_micro", "accuracy")),
        (lambda n: {"number": n / 10}, ("r2", "mean_absolute_error")),
    ],
    ids=["any number of classes", "a number"],
)
def test_classifiers_of_other_kinds_are_compared_with_a_constant(
    answer: Any, names: tuple[str, ...], bert: Path, tmp_path: Path, home: Home
) -> None:
    rows = [{"text": f"the cat {n}", **answer(n)} for n in range(24)]
    job = run_of(tmp_path, bert, home, "text-classification", rows=rows)
    found = found_of(job)
    assert "no head for this task" in (found.evaluation.compared_with or "")
    assert set(names) < {metric.name for metric in found.evaluation.metrics}
    write_predictions(found, job.data.labels, tmp_path / "p.parquet")
    assert parquet.read_table(tmp_path / "p.parquet").num_rows == len(found.tuned)


def test_pictures_are_evaluated_from_a_run_and_from_files(vit: Path, tmp_path: Path, home: Home) -> None:
    for n, colour in enumerate(("red", "blue") * 8):
        folder = tmp_path / "pictures" / colour
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + n, 20), colour).save(folder / f"{n}.png")
    job = make_run(tmp_path / "r1", make_recipe(vit, tmp_path / "pictures", "image-classification"), home)
    found = found_of(job)
    assert [each.name for each in found.evaluation.classes] == ["blue", "red"]
    assert found.evaluation.worsened[0].text == ""
    publish(job, {}, home=home)
    (tmp_path / "encoded").mkdir()
    trained = published("bot", home=home)
    rows = rows_of([str(tmp_path / "pictures")], trained, columns=None, folder=tmp_path / "encoded", watch=unwatched)
    model, fresh = trained.load()
    whole = evaluate(trained, model, rows, fresh=fresh)
    assert whole.tuned.loss[found.numbers] == pytest.approx(found.tuned.loss, rel=1e-4)


def test_predictions_say_which_row_of_the_data_set_they_are_of(bert: Path, tmp_path: Path, home: Home) -> None:
    job = run_of(tmp_path, bert, home, "text-classification")
    found = found_of(job)
    write_predictions(found, job.data.labels, tmp_path / "p.parquet")
    table = parquet.read_table(tmp_path / "p.parquet")
    assert json.loads(table.schema.metadata[b"labels"]) == ["cat", "dog", "rain"]
    columns = table.to_pydict()
    assert columns["wanted"] == [("cat", "dog", "rain")[row % 3] for row in columns["row"]]
    assert columns["row"] == np.load(job.data.folder / "validation.npy").tolist()
    for answer, probabilities, loss, wanted in zip(
        columns["answer"], columns["probabilities"], columns["loss"], columns["wanted"], strict=True
    ):
        assert answer == ("cat", "dog", "rain")[int(np.argmax(probabilities))]
        assert loss == pytest.approx(-np.log(probabilities[("cat", "dog", "rain").index(wanted)]), rel=1e-4)


def test_a_class_head_is_compared_with_the_commonest_class(bert: Path, tmp_path: Path, home: Home) -> None:
    rows = [{"text": f"the cat {n}", "label": "cat" if n % 4 else "dog"} for n in range(40)]
    found = found_of(run_of(tmp_path, bert, home, "text-classification", rows=rows))
    [accuracy] = [metric for metric in found.evaluation.metrics if metric.name == "accuracy"]
    assert found.evaluation.compared_with == "always 'cat', the commonest class, as the base has no head for this task"
    assert accuracy.base is not None
    assert accuracy.base.value == pytest.approx((found.tuned.targets == 0).mean())


def test_a_run_leaves_its_report_and_publishes_it(
    bert: Path, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = run_of(tmp_path, bert, home, "text-classification")
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    monkeypatch.setattr("sys.argv", ["check", str(job.folder)])
    assert check() == 0
    assert "largest difference from training" in capsys.readouterr().out
    left = {path.name for path in job.folder.iterdir()}
    plots = {f"plot_{name}.png" for name in ("losses", "learning_rate", "forgetting", "confusion", "calibration")}
    assert left >= {"evaluation.json", "verdict.json", "predictions.parquet", "report.html", *plots}
    assert "evaluating.json" not in left
    page = (job.folder / "report.html").read_text()
    assert "Healthy: validation loss from 3.0000 to 1.4062" in page
    assert "<b>" not in page.partition("Improved most")[2].partition("Where it comes from")[0], "rows stand in the page as text"
    assert not [mark for mark in ("<script", "http://", "https://cdn", "src=") if mark in page.replace("http://www.w3.org", "")]

    manifest = publish(job, {"eval_loss": 1.4, "base_eval_loss": 3.0}, home=home)
    folder = home.registry / "bot" / "1"
    assert set(manifest.files) >= {"report.html", "evaluation.json", *plots}
    assert "predictions.parquet" not in manifest.files
    card = (folder / "README.md").read_text()
    assert "![Losses](plot_losses.png)" in card
    assert "Healthy: validation loss" in card


def test_a_damaged_export_gets_no_report(llama: Path, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    job = run_of(tmp_path, llama, home, "chat")
    config = json.loads((job.export_folder / "adapter_config.json").read_text())
    (job.export_folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 100 * config["lora_alpha"]}))
    assert difference(job) > 1e-2
    monkeypatch.setattr("sys.argv", ["check", str(job.folder)])
    assert check() == 1
    assert not (job.folder / "report.html").exists()


def test_an_evaluation_that_fails_loses_nothing_but_the_report(
    llama: Path, tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run_of(tmp_path, llama, home, "chat")
    (job.data.folder / "validation.npy").write_bytes(b"not an array")
    monkeypatch.setattr("sys.argv", ["check", str(job.folder)])
    assert check() == 3


@pytest.fixture
def bot(bert: Path, tmp_path: Path, home: Home) -> Job:
    """bot@1, a text classifier."""
    job = run_of(tmp_path, bert, home, "text-classification")
    publish(job, {}, home=home)
    return job


@pytest.mark.usefixtures("bot")
def test_an_adapter_is_evaluated_on_any_file(tmp_path: Path, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "other.csv"
    data.write_text(
        "".join(["review,kind\n", *(f"the {row['label']} ran,{row['label']}\n" for row in rows_for("text-classification", 30))])
    )
    columns = ["--column", "text=review", "--column", "label=kind"]
    argv = ["bot@1", "--data", str(data), *columns, "--rows", "10", "--out", str(tmp_path / "out"), "--home", str(home.root)]
    assert evaluate_command(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["rows_there"], len(found["confusion"])) == (10, 30, 3)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"evaluation.json", "predictions.parquet", "report.html"}


def test_the_same_rows_are_evaluated_alike_from_files_and_from_the_run(bot: Job, tmp_path: Path, home: Home) -> None:
    trained = published("bot", home=home)
    folder = tmp_path / "encoded"
    folder.mkdir()
    rows = rows_of([str(tmp_path / "rows.jsonl")], trained, columns=None, folder=folder, watch=unwatched)
    model, fresh = trained.load()
    whole = evaluate(trained, model, rows, fresh=fresh, options=Options())
    part = found_of(bot)
    assert whole.tuned.loss[part.numbers] == pytest.approx(part.tuned.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metrics", "rouge"], "--metrics rouge: task text-classification does not have it; it has accuracy, f1_macro, ece, loss"),
        (["--metrics", "acuracy"], "--metrics acuracy: there is no metric of that name; it has accuracy"),
    ],
)
def test_a_metric_that_the_task_does_not_have_is_refused(
    bot: Job, home: Home, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(bot.recipe.data.train)
    assert evaluate_command(["bot", "--data", data.strip("[]'"), *arguments, "--home", str(home.root)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "hello", "label": "bird"}, "class 'bird' is none of the model's (1 such); it knows cat, dog, rain"),
        ({"text": "hello", "number": 3}, "a number a row .* and the model answers with one class a row"),
        ({"text": "hello"}, "rows.jsonl:1: "),
    ],
)
@pytest.mark.usefixtures("bot")
def test_rows_that_the_model_cannot_answer_are_refused(tmp_path: Path, home: Home, row: dict[str, Any], said: str) -> None:
    other, folder = tmp_path / "other", tmp_path / "encoded"
    other.mkdir()
    folder.mkdir()
    data = written(other / "rows.jsonl", [row])
    with pytest.raises(DataError, match=said.replace("(", r"\(").replace(")", r"\)")):
        rows_of([str(data)], published("bot", home=home), columns=None, folder=folder, watch=unwatched)


def test_a_base_that_has_changed_or_gone_is_said_so(bert: Path, tmp_path: Path, home: Home) -> None:
    base = Path(shutil.copytree(bert, tmp_path / "base"))
    publish(run_of(tmp_path, base, home, "text-classification"), {}, home=home)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    with pytest.raises(BaseModelError, match=r"bot@1: its base .* is not what it was trained on \(fingerprint"):
        published("bot", home=home)
    shutil.rmtree(base)
    with pytest.raises(BaseModelError, match=r"bot@1: its base cannot be found; .*no such base model folder"):
        published("bot", home=home)


def test_groups_of_metrics_are_those_that_the_task_has() -> None:
    assert chosen_metrics(["rouge"], task="seq2seq") == ("rouge1", "rouge2", "rougeL")
    assert chosen_metrics(["f1"], task="text-classification") == ("f1_macro",)
    with pytest.raises(RecipeError, match="with numbers does not have it"):
        chosen_metrics(["f1"], task="text-classification", problem_type="regression")


def test_what_is_no_number_is_null_in_json_and_comes_back() -> None:
    estimate = Estimate(value=float("inf"), low=float("nan"), high=2.0)
    assert json.loads(estimate.model_dump_json()) == {"value": None, "low": None, "high": 2.0}
    assert np.isnan(Estimate.model_validate_json(estimate.model_dump_json()).value)


def test_names_of_classes_are_drawn_as_they_are(bert: Path, tmp_path: Path, home: Home) -> None:
    rows = [{"text": f"the cat {n}", "label": ["$a_{b$ & <c>", "50$"][n % 2]} for n in range(24)]
    found = found_of(run_of(tmp_path, bert, home, "text-classification", rows=rows))
    [confusion] = [plot for plot in plots([], found.evaluation, budget=None) if plot.name == "confusion"]
    assert "$a_{b$ &amp; &lt;c&gt;" in confusion.svg
    assert "var(--ink)" in confusion.svg
    assert confusion.png.startswith(b"\x89PNG")


def test_a_single_row_has_an_evaluation_too(bert: Path, tmp_path: Path, home: Home) -> None:
    rows = [{"text": f"the cat {n}", "number": n / 10} for n in range(24)]
    job = run_of(tmp_path, bert, home, "text-classification", rows=rows)
    found = found_of(job, rows=1)
    write_found(found, tmp_path, labels=None)
    again = read_evaluation(tmp_path)
    assert again is not None
    assert np.isnan({metric.name: metric.tuned.value for metric in again.metrics}["r2"])


MANY = [{"text": f"row {n} {'cat ' * (n % 2)}{'dog ' * (n % 3)}", "labels": ["cat"] * (n % 2) + ["dog"] * (n % 3 > 0)} for n in range(24)]
NUMBERS = [{"text": "very " * (n % 4) + f"good {n}", "number": float(n % 4)} for n in range(24)]


@pytest.mark.parametrize(
    ("task", "base", "rows"),
    [
        ("text-classification", "bert", None),
        ("text-classification", "bert", MANY),
        ("text-classification", "bert", NUMBERS),
        ("token-classification", "bert", None),
        ("chat", "llama", None),
        ("preference", "llama", None),
    ],
)
def test_tables_of_predictions_pool_to_the_metrics_of_all_their_rows(
    task: TaskName, base: str, rows: Any, tmp_path: Path, home: Home, request: pytest.FixtureRequest
) -> None:
    job = run_of(tmp_path, request.getfixturevalue(base), home, task, **({"rows": rows} if rows else {}))
    found = found_of(job, written_rows=0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_found(found, tmp_path / name, labels=job.data.labels)
    names = [name for name in metrics_of(task, job.data.problem_type) if not METRICS[name].generates and name != "chosen_likelier"]
    twice = read_predictions([tmp_path / name / "predictions.parquet" for name in ("a", "b")])
    assert len(twice) == 2 * found.evaluation.rows
    pooled = {measure.name: measure.value for measure in measures(twice, names)}
    assert pooled == {
        name: pytest.approx(measure.value, rel=1e-6) for name, measure in zip(names, measures(found.tuned, names), strict=True)
    }
