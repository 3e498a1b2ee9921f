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
from hone.data.rows import ReadRow
from hone.errors import DataError, HoneError
from hone.recipe import load_recipe
from hone.storage import Home
from models.tasks import TASKS, Task
from models.tasks.tokenizer import NO_TEMPLATE, lacks_template
from training.tokenise import longest, measured, with_media


def measure(task: Task, processor: Any, *, max_length: int) -> Callable[[ReadRow], Measured]:
    """How the model sees a row of that task."""

    def seen(read: ReadRow) -> Measured:
        [made] = task.encode([with_media(read)], processor, max_length=max_length)
        if isinstance(made, DataError):
            raise made
        return measured(made)

    return seen


def main() -> int:
    """Print the report; 1 where the data or the base cannot be read at all."""
    parser = argparse.ArgumentParser(prog="python -m training.gate")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--home")
    args = parser.parse_args()
    try:
        recipe, home = load_recipe(args.recipe, args.overrides), Home(args.home)
        base, task, data = find_base_model(recipe.base, home=home, revision=recipe.revision), TASKS[recipe.task], recipe.data
        look = measure(task, task.load_processor(base.folder), max_length=longest(recipe, base))
        read = partial(look_at, shape=task.shape, group_by=data.group_by, measure=look, unit=task.unit, near_rows=data.near_duplicate_rows)
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
