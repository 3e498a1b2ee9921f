"""`python -m training.plan RECIPE [KEY=VALUE ...]`: what a recipe takes, as JSON; `hone plan` prints it."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hone.errors import HoneError, ResourceError
from hone.recipe import Recipe, load_recipe
from hone.storage import Home

NOTHING_FITS = 3
"""Exit code of a plan in which nothing fits: it is there, and is printed."""


def main(argv: list[str] | None = None) -> int:
    """Print a plan; the exit code: 0 something fits, 3 nothing does, 1 a mistake (said in one line)."""
    args = _arguments(argv)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        text, fits = _plan(recipe, args)
    except HoneError as error:
        print(f"hone: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    print(text)  # noqa: T201
    return 0 if fits else NOTHING_FITS


def _plan(recipe: Recipe, args: argparse.Namespace) -> tuple[str, bool]:
    # Heavy: torch and transformers. Imported once the recipe is known to be sound.
    from hone.base_model import find_base_model
    from training.data import prepare_data
    from training.plan.hardware import load_hardware, load_prices, parse_cluster
    from training.plan.machines import ray_cluster, this_machine
    from training.plan.plan import make_plan

    hardware, prices = load_hardware(args.hardware), load_prices(args.prices)
    cluster = parse_cluster(args.cluster, hardware) if args.cluster else None
    home = Home(args.home)
    home.ready()
    base = find_base_model(recipe.base, home=home, revision=recipe.revision)
    data = prepare_data(recipe, base, home=home)
    if cluster is None and args.address:
        with _ray(args.address):
            cluster = ray_cluster(recipe, hardware)
    made = make_plan(recipe, base, data, cluster=cluster or this_machine(recipe, hardware), hardware=hardware, prices=prices)
    return made.model_dump_json(), made.recommended is not None


@contextmanager
def _ray(address: str) -> Iterator[None]:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(f"cannot reach Ray at {address}: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.plan")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--cluster", metavar="SPEC")
    parser.add_argument("--address", metavar="HOST:PORT")
    parser.add_argument("--prices", type=Path)
    parser.add_argument("--hardware", type=Path)
    parser.add_argument("--home")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
