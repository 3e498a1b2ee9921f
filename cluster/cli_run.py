"""`hone train` and `hone tune`: a recipe here, in a child process that this one waits for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster.terminal import notes
from hone.errors import RecipeError

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Overrides such as optim.learning_rate=2e-4.", show_default=False)
]
HomeOption = Annotated[str | None, typer.Option("--home", help="Home folder (default $HONE_HOME or ./.hone).", show_default=False)]
RayAddress = Annotated[
    str | None, typer.Option("--address", help="Ray cluster, HOST:PORT (default $RAY_ADDRESS, else a local Ray).", show_default=False)
]

Folds = Annotated[
    int | None,
    typer.Option("--folds", min=2, help="First train on so many folds, each time without one; then on everything.", show_default=False),
]


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    home: HomeOption = None,
    address: RayAddress = None,
    folds: Folds = None,
) -> None:
    """Train a recipe here, on a local Ray or a cluster this machine can join."""
    _run(recipe, overrides or [], home=home, address=address, is_search=False, folds=folds)


def tune(recipe: RecipeFile, overrides: Overrides = None, home: HomeOption = None, address: RayAddress = None) -> None:
    """Run a recipe's search and publish the best trial."""
    _run(recipe, overrides or [], home=home, address=address, is_search=True)


def _run(path: Path, overrides: list[str], *, home: str | None, address: str | None, is_search: bool, folds: int | None = None) -> None:
    from cluster.entrypoint import training_argv
    from hone.ids import new_run_id
    from hone.recipe import load_recipe
    from hone.storage import Home

    recipe = load_recipe(path, overrides)
    if is_search:
        check_has_search(recipe.search, path)
    place = Home(home)
    place.ready()
    run_id = new_run_id(recipe.name)
    argv = training_argv(path, overrides, is_search=is_search, folds=folds, home=place.root, run_id=run_id, address=address)
    code = run_training(argv, address=address, has_trials=is_search or bool(folds))
    if code in (130, 143):
        left = (place.runs / run_id).is_dir()
        where = f"; what it wrote is in {place.runs / run_id}" if left else ""
        can_go_on = left and not is_search and not folds
        again = f"`hone runs resume {run_id}` goes on with it" if can_go_on else "the same command starts it again"
        notes().print(f"hone: stopped{where}; {again}", markup=False)
    raise typer.Exit(code)


def run_training(argv: Sequence[str], *, address: str | None, has_trials: bool = False) -> int:
    """Run the training in a child process, with a Ray of its own where no cluster is named; its exit code."""
    from cluster.child import run_child
    from cluster.connect import local_environment, local_ray

    is_local = not (address or os.environ.get("RAY_ADDRESS"))
    if is_local and has_trials:
        # A trial that was stopped gives back its CPUs through Ray's dashboard, which a Ray inside the child would not have.
        with local_ray() as ray:
            return run_child(argv, environment=ray.environment)
    return run_child(argv, environment=local_environment() if is_local else {})


def check_has_search(search: object, path: Path) -> None:
    """Raises RecipeError where a recipe says nothing to search."""
    if search is None:
        raise RecipeError(f"{path}: no search: section, so there is nothing to tune; `hone recipe init` writes a recipe that has one")
