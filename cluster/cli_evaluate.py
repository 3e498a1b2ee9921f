"""`hone evaluate` and `hone export`: a published adapter on any data, and as a plain Hugging Face folder. Each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.cli_run import HomeOption
from cluster.terminal import notes, output, table
from hone.errors import RecipeError

EVALUATION = "training.evaluation"
EXPORT = "training.export_adapter"
FORMATS = ("merged", "peft")
CUT = 100
"""Characters of a text in a table."""

Ref = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Adapter, version or alias.", show_default=False)]


def evaluate(
    ref: Ref,
    data: Annotated[list[str], typer.Option(help="File, folder, glob or URI of rows; may be given again.", show_default=False)],
    base: Annotated[bool, typer.Option("--base/--no-base", help="Compare with the base.")] = True,
    metrics: Annotated[
        list[str] | None, typer.Option(help="A metric, or f1, rouge; may be given again. By default all of the task.", show_default=False)
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows to draw at random; by default all.", show_default=False)] = None,
    written_rows: Annotated[
        int | None, typer.Option(min=0, help="Rows to write answers to; by default 50, and 100 of seq2seq.", show_default=False)
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="A column that is called otherwise in the files.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for evaluation.json, predictions.parquet, report.html and the plots.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: HomeOption = None,
) -> None:
    """How good an adapter is on some rows, beside its base, with 95% intervals.

    The metrics are those of its task: accuracy, F1 and calibration of classes; errors of numbers; perplexity and exact match of what is
    written; chrF, BLEU and ROUGE of seq2seq; reward accuracy of preferences.
    """
    _check_before_loading(ref, metrics, column, home)
    argv = [sys.executable, "-P", "-m", EVALUATION, ref, "--base" if base else "--no-base"]
    for name, values in (("--data", data), ("--metrics", metrics or []), ("--column", column or [])):
        argv += [part for value in values for part in (name, value)]
    for name, value in (("--rows", rows), ("--written-rows", written_rows), ("--out", out), ("--home", home)):
        argv += [name, str(value)] if value is not None else []
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    if as_json:
        typer.echo(done.stdout.rstrip())
        return
    _print(json.loads(done.stdout), output())
    if out:
        notes().print(f"wrote {out / 'report.html'}", markup=False)


def export(
    ref: Ref,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not be there, or be empty.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format", metavar="merged|peft", help="merged: a whole model for transformers. peft: the adapter alone.", show_default=False
        ),
    ],
    home: HomeOption = None,
) -> None:
    """Write a published adapter as a plain Hugging Face folder, which loads without hone."""
    if form not in FORMATS:
        raise RecipeError(f"--format {form}: must be {' or '.join(FORMATS)}")
    argv = [sys.executable, "-P", "-m", EXPORT, ref, "--format", form, "--out", str(out), *(["--home", home] if home else [])]
    code = subprocess.run(argv, check=False).returncode
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)
    notes().print(f"wrote {out}", markup=False)


def _check_before_loading(ref: str, metrics: list[str] | None, column: list[str] | None, home: str | None) -> None:
    """What is known to be wrong before torch is loaded to find out."""
    from hone.metrics import chosen_metrics
    from hone.registry import Registry
    from hone.storage import Home

    manifest = Registry(Home(home)).resolve(ref)
    chosen_metrics(metrics, task=manifest.task, problem_type=manifest.problem_type)
    for pair in column or []:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise RecipeError(f"--column {pair!r}: write OURS=THEIRS, such as text=review")


def _print(found: dict[str, Any], console: Console) -> None:
    drawn = f" of {found['rows_there']:,}" if found["rows"] < found["rows_there"] else ""
    written = f", answers written to {found['written_rows']:,}" if found["written_rows"] else ""
    console.print(f"{found['name']} on {found['rows']:,}{drawn} rows{written}", markup=False)
    if found["compared_with"]:
        console.print(f"base: {found['compared_with']}", markup=False)
    rows = [(m["name"], _estimate(m["base"]), _estimate(m["tuned"]), _estimate(m["change"], signed=True)) for m in found["metrics"]]
    console.print()
    console.print(table(("METRIC", "BASE", "TUNED", "CHANGE"), rows))
    if found["classes"]:
        console.print()
        console.print(table(("CLASS", "COUNT", "PRECISION", "RECALL", "F1", "BASE F1"), [_class_row(each) for each in found["classes"]]))
    if 1 < len(found["confusion"]) <= 20:
        names = [each["name"] for each in found["classes"]]
        counts = [(name, *(f"{count:,}" for count in row)) for name, row in zip(names, found["confusion"], strict=True)]
        console.print()
        console.print(table(("WANTED \\ ANSWERED", *names), counts))
    for title, examples in (("improved most", found["improved"]), ("worsened most", found["worsened"])):
        if examples:
            console.print(f"\n{title if found['compared_with'] else 'hardest'}:", markup=False)
            console.print(table(("ROW", "LOSS", "GIVEN", "WANTED", "TUNED"), [_example_row(each) for each in examples]))


def _estimate(estimate: dict[str, Any] | None, *, signed: bool = False) -> str:
    if estimate is None:
        return ""
    value, low, high = (
        "-" if estimate[name] is None else f"{estimate[name]:{'+' if signed else ''}.4g}" for name in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def _class_row(each: dict[str, Any]) -> tuple[str, ...]:
    base = "" if each["base_f1"] is None else f"{each['base_f1']:.3f}"
    return each["name"], f"{each['count']:,}", f"{each['precision']:.3f}", f"{each['recall']:.3f}", f"{each['f1']:.3f}", base


def _example_row(each: dict[str, Any]) -> tuple[str, ...]:
    before = "" if each["base_loss"] is None else f"{each['base_loss']:.3f} -> "
    texts = (" ".join(each[name].split()) for name in ("text", "wanted", "answer"))
    cut = (text if len(text) <= CUT else text[: CUT - 1] + "…" for text in texts)
    return str(each["row"]), f"{before}{each['loss']:.3f}", *(text.replace("[", r"\[") for text in cut)
