"""`python -m training.gate RECIPE`: a look at a recipe's data with the base's own tokenizer, as JSON; `hone data check` prints it."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from hone.base_model import find_base_model
from hone.data.files import find_files
from hone.data.gate import Measured, joined, look_at, report
from hone.data.parts import cut
from hone.errors import DataError, HoneError
from hone.recipe import load_recipe
from hone.storage import Home
from training.tasks import TASKS, Task


def measure(task: Task, tokenizer: Any, *, max_length: int) -> Callable[[dict[str, Any]], Measured]:
    """How the tokenizer sees a row of that task."""

    def measured(row: dict[str, Any]) -> Measured:
        [made] = task.encode([row], tokenizer, max_length=max_length)
        if isinstance(made, DataError):
            raise made
        return Measured(made.length, made.n_targets, is_cut=made.length > max_length)

    return measured


def main() -> int:
    """Print the report; 1 where the data or the base cannot be read at all."""
    parser = argparse.ArgumentParser(prog="python -m training.gate")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--home")
    args = parser.parse_args()
    try:
        from training.tokenise import NO_TEMPLATE, lacks_template, load_tokenizer

        recipe, home = load_recipe(args.recipe, args.overrides), Home(args.home)
        base, task, data = find_base_model(recipe.base, home=home, revision=recipe.revision), TASKS[recipe.task], recipe.data
        look = measure(task, load_tokenizer(base.folder), max_length=min(data.max_length, base.max_context))
        read = partial(look_at, shape=task.shape, group_by=data.group_by, measure=look, near_rows=data.near_duplicate_rows)
        sources = [
            (data.train, None),
            *((mixed.source, mixed.columns) for mixed in data.mix),
            *([(data.retain, None)] if data.retain else []),
        ]
        train = joined([read(cut(find_files(paths)), columns=columns or data.columns) for paths, columns in sources])
        held = read(cut(find_files(data.validation)), columns=data.columns) if data.validation else None
        found = report(train, held, near_rows=data.near_duplicate_rows)
    except HoneError as error:
        print(f"hone: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    if task.shape == "chat" and lacks_template(base.folder):
        found.notes.append(NO_TEMPLATE)
    print(found.model_dump_json())  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
