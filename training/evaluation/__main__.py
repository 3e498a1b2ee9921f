"""`python -m training.evaluation NAME[@VERSION] --data FILE...`: what `hone evaluate` runs. Prints what was found as JSON."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hone.errors import HoneError
from hone.metrics import chosen_metrics
from hone.storage import Home, write_text
from training.evaluation.watch import bars

if TYPE_CHECKING:
    from training.evaluation.result import Evaluation
    from training.trained import Trained


def main(argv: list[str] | None = None) -> int:
    """Evaluate one adapter; the exit code: 0 done, 1 a mistake (said in one line)."""
    args = _arguments(argv)
    try:
        print(_evaluated(args))  # noqa: T201 - what this program is for
    except HoneError as error:
        print(f"hone: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _evaluated(args: argparse.Namespace) -> str:
    # Heavy: torch and transformers.
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from training.evaluation.after import write_found
    from training.evaluation.evaluate import Options, best_device, evaluate
    from training.evaluation.rows import rows_of
    from training.trained import published

    disable_progress_bar()
    set_verbosity_error()  # that a head is new is said in what is printed
    options = Options(
        compare=args.base,
        metrics=args.metrics,
        rows=args.rows,
        written_rows=args.written_rows,
        written_tokens=args.written_tokens,
        seed=args.seed,
    )
    trained = published(args.ref, home=Home(args.home), needs_base=args.base)
    chosen_metrics(args.metrics, task=trained.recipe.task, problem_type=trained.head.problem_type)
    columns = dict(pair.split("=", 1) for pair in args.column) if args.column else None
    with bars(Console(stderr=True)) as watch, tempfile.TemporaryDirectory(prefix="hone-evaluation-") as folder:
        rows = rows_of(args.data, trained, columns=columns, folder=Path(folder), watch=watch)
        watch("loading the model", 0, 1)
        model, fresh = trained.load()
        watch("loading the model", 1, 1)
        found = evaluate(trained, model.to(best_device()), rows, fresh=fresh, options=options, watch=watch)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_found(found, args.out, labels=trained.head.labels)
        _write_page(found.evaluation, trained, args)
    return found.evaluation.model_dump_json(indent=2)


def _write_page(evaluation: "Evaluation", trained: "Trained", args: argparse.Namespace) -> None:
    from training.evaluation.places import REPORT_FILE
    from training.evaluation.plots import plots
    from training.evaluation.report import report

    drawn = plots([], evaluation, budget=None)
    for plot in drawn:
        (args.out / plot.file).write_bytes(plot.png)
    facts = [("adapter", trained.name), ("base", trained.base_name), ("data", ", ".join(args.data))]
    subtitle = f"{trained.recipe.task} by {trained.method}, tuned from {trained.base_name}, on {', '.join(args.data)}"
    page = report(title=trained.name, subtitle=subtitle, recipe=trained.recipe, facts=facts, evaluation=evaluation, plots=drawn)
    write_text(args.out / REPORT_FILE, page)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.evaluation")
    parser.add_argument("ref", help="NAME[@VERSION] or alias")
    parser.add_argument("--data", action="append", required=True, help="file, folder, glob or URI; may be given again")
    parser.add_argument("--column", action="append", metavar="OURS=THEIRS")
    parser.add_argument("--base", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--metrics", action="append")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--written-rows", type=int)
    parser.add_argument("--written-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--home")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
