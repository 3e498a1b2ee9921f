"""`python -m training.gate RECIPE`: a look at a recipe's data with the base's own tokenizer, as JSON; `hone data check` prints it."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from hone.base_model import find_base_model
from hone.data.files import find_files
from hone.data.gate import Measured, examine
from hone.data.rows import read_rows
from hone.errors import DataError, HoneError
from hone.recipe import load_recipe
from hone.storage import Home
from training.tasks import TASKS, Task


def measure(task: Task, tokenizer: Any, *, max_length: int) -> Callable[[dict[str, Any]], Measured]:
    """How the tokenizer sees a row of that task."""

    def measured(row: dict[str, Any]) -> Measured:
        labels = [row["label"]] if "label" in row else None
        try:
            whole, _ = task.encode(row, tokenizer, max_length=sys.maxsize, labels=labels)
            kept, is_cut = task.encode(row, tokenizer, max_length=max_length, labels=labels)
        except DataError:
            return Measured(0, 0, is_cut=False)
        return Measured(len(whole.input_ids), kept.n_targets, is_cut)

    return measured


def main() -> int:
    """Print the report; 1 where the data or the base cannot be read at all."""
    parser = argparse.ArgumentParser(prog="python -m training.gate")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--home")
    args = parser.parse_args()
    try:
        from training.data import load_tokenizer

        recipe, home = load_recipe(args.recipe, args.overrides), Home(args.home)
        base, task, data = find_base_model(recipe.base, home=home, revision=recipe.revision), TASKS[recipe.task], recipe.data
        look = measure(task, load_tokenizer(base.folder), max_length=min(data.max_length, base.max_context))
        parts = [read_rows(find_files(s), shape=task.shape, columns=data.columns) if s else None for s in (data.train, data.validation)]
        assert parts[0] is not None
        report = examine(parts[0], parts[1], measure=look, near_rows=data.near_duplicate_rows)
    except HoneError as error:
        print(f"hone: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    print(report.model_dump_json())  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
