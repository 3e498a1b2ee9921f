"""`hone data`: look at data before anything is leased for it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli_cache import cache
from cluster.cli_run import HomeOption
from cluster.terminal import notes, output
from hone.data.formats import Row
from hone.data.report import MEANINGS, STOPPING, Report, Summary
from hone.data.rows import ReadRow
from hone.errors import HoneError, RecipeError

data = typer.Typer(help="Data: check, cache.", no_args_is_help=True)
data.add_typer(cache, name="cache")

Paths = Annotated[
    list[str], typer.Argument(metavar="PATH...", help="Files, folders, globs or URIs; or one recipe (.yaml).", show_default=False)
]
Columns = Annotated[
    list[str] | None, typer.Option(metavar="OURS=THEIRS", help="A column that is called otherwise in the files.", show_default=False)
]
BAR = 40
GATE = "training.gate"
RECIPE_SUFFIXES = (".yaml", ".yml")


@data.command()
def check(
    paths: Paths,
    validation: Annotated[list[str] | None, typer.Option(help="Validation rows, likewise.", show_default=False)] = None,
    column: Columns = None,
    near: Annotated[int, typer.Option(help="Rows among which to look for near duplicates; 0 for none.")] = 50_000,
    redact: Annotated[Path | None, typer.Option(help="Write the good training rows here without private data.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: HomeOption = None,
) -> None:
    """Bad rows, duplicates, leakage, lengths, classes, private data.

    Exit code 1 where a training would not start: bad rows, leakage (or what the recipe's data.stop_on names), or nothing to train on.
    Given a recipe, lengths are tokens of its base model, and rows that data.max_length cuts are told.
    """
    is_recipe = len(paths) == 1 and paths[0].endswith(RECIPE_SUFFIXES)
    if is_recipe:
        report, stops_on = _look_by_recipe(paths[0], home)
    else:
        report, stops_on = _look(paths, validation, _columns(column), near), set(STOPPING)
    if redact:
        _write_redacted(paths, _columns(column), redact)
    if as_json:
        typer.echo(json.dumps({**report.model_dump(mode="json"), "stops": [f.kind for f in report.stopping(stops_on)]}, indent=2))
    else:
        _print(report, stops_on, output())
    raise typer.Exit(1 if report.stopping(stops_on) else 0)


def _look(paths: list[str], validation: list[str] | None, columns: dict[str, str], near: int) -> Report:
    from hone.data.files import find_files
    from hone.data.gate import look_at, report
    from hone.data.parts import cut

    looks = [look_at(cut(find_files(sources)), columns=columns, near_rows=near) for sources in (paths, validation) if sources]
    return report(looks[0], looks[1] if validation else None, near_rows=near)


def _look_by_recipe(path: str, home: str | None) -> tuple[Report, set[str]]:
    """In a process of its own, which has the tokenizer."""
    from hone.recipe import load_recipe

    recipe = load_recipe(path)
    argv = [sys.executable, "-P", "-m", GATE, path, *(["--home", home] if home else [])]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise typer.Exit(1)
    stops_on = {*recipe.data.stop_on, "no_rows", *(() if recipe.data.max_bad_fraction else ("bad_rows",))}
    return Report.model_validate_json(done.stdout), stops_on


def _columns(pairs: list[str] | None) -> dict[str, str]:
    columns = {}
    for pair in pairs or []:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise RecipeError(f"--column {pair!r}: write OURS=THEIRS, such as text=review")
        columns[ours] = theirs
    return columns


def _write_redacted(paths: list[str], columns: dict[str, str], target: Path) -> None:
    """The good rows, as JSON Lines of their shape."""
    from hone.data.files import find_files
    from hone.data.parts import cut
    from hone.data.private import redacted
    from hone.data.rows import read_rows
    from hone.storage import write_lines

    if target.exists():
        raise HoneError(f"{target}: is already there; name another file")
    good = (read for read in read_rows(cut(find_files(paths)), columns=columns) if read.row)
    written = write_lines(target, (json.dumps(redacted(_text_row(read)), ensure_ascii=False) for read in good))
    notes().print(f"wrote {written:,} rows to {target}", markup=False)


def _text_row(read: ReadRow) -> Row:
    if read.content is not None or read.row is None:
        raise HoneError(f"{read.file.name}: holds pictures or sounds, and --redact takes private data out of texts only")
    return read.row


def _print(report: Report, stops_on: set[str], console: Console) -> None:
    for name, part in (("training", report.train), ("validation", report.validation)):
        if part:
            console.print("\n".join(_part_lines(name, part)), markup=False)
    for finding in report.findings:
        mark = "stop" if finding.kind in stops_on else "note"
        console.print(f"\n{mark}  {MEANINGS[finding.kind]}: {finding.count:,}", markup=False)
        for where in finding.where:
            console.print(f"      {where}", markup=False)
        if finding.where and finding.kind == "bad_rows" and finding.count > len(finding.where):
            console.print(f"      ... and {finding.count - len(finding.where):,} more", markup=False)
    if not report.findings:
        console.print("\nNothing to remark.")
    for note in report.notes:
        console.print(f"\n{note[0].upper()}{note[1:]}.", markup=False)


def _part_lines(name: str, part: Summary) -> Iterator[str]:
    formats = ", ".join(f"{rows:,} {name}" for name, rows in part.formats.items())
    yield f"{name}: {part.rows:,} rows in {part.files:,} file{'s' if part.files != 1 else ''}" + (f" ({formats})" if formats else "")
    if part.labels:
        total = sum(part.labels.values())
        yield from (f"  {label:<24} {count:>9,}  {count / total:6.1%}" for label, count in list(part.labels.items())[:20])
        if len(part.labels) > 20:
            yield f"  ... and {len(part.labels) - 20:,} more classes"
    if part.lengths:
        lengths, most = part.lengths, max(part.lengths.counts)
        yield f"  {lengths.total:,} {lengths.unit}; median {lengths.median:,}, 95% below {lengths.p95:,}, longest {lengths.longest:,}"
        for start, end, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
            yield f"  {start:>7,} to {end - 1:>7,}  {'█' * round(BAR * count / most):<{BAR}} {count:,}"
