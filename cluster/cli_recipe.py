"""`hone recipe`: write one, check one, and the schema that editors complete from."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_run import Overrides, RecipeFile
from cluster.terminal import notes, output
from hone.errors import RecipeError

recipe = typer.Typer(help="Recipes: init, show, schema.", no_args_is_help=True)

STARTER = """\
# A hone recipe. Every key, its unit and its default: `hone recipe schema`. Paths are relative to this file.
name: my-adapter            # published as my-adapter@1, my-adapter@2, ...
task: chat                  # or text-classification
base: Qwen/Qwen3-0.6B       # a Hugging Face folder or a hub name

data:
  train: train.jsonl        # one {"messages": [...]} a line, as OpenAI writes it; for text-classification also .csv and .parquet
  # validation: validation.jsonl    # without one, validation_fraction of the training rows is held out
  max_length: 1024          # tokens

method:
  type: lora                # full trains every weight
  r: 16
  lora_alpha: 32

optim:
  learning_rate: 2.0e-4     # 1e-5 to 5e-5 for method full

train:
  num_train_epochs: 3
  global_batch_size: 32     # rows a step over all workers
  micro_batch_size: 8       # rows at once on one worker

zero:
  stage: 2                  # 3 shards the weights too, for a base that does not fit one GPU

scaling:
  num_workers: 1            # one GPU each where there are any

search:                     # what `hone tune` tries
  num_samples: 8
  space:
    optim.learning_rate: {type: loguniform, lower: 5.0e-5, upper: 1.0e-3}
    method.r: {type: choice, categories: [8, 16, 32]}
"""


@recipe.command()
def init(path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml")) -> None:
    """Write a recipe to start from, with a comment at each key."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER)
    except FileExistsError:
        raise RecipeError(f"{path}: is already there; name another file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror})") from None
    notes().print(f"wrote {path}; fill in base and data, then: hone train {path}", markup=False)


@recipe.command()
def show(path: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe and print all of it, defaults and overrides included."""
    import yaml

    from hone.recipe import load_recipe

    output().print(yaml.safe_dump(load_recipe(path, overrides).model_dump(mode="json"), sort_keys=False).rstrip(), markup=False)


@recipe.command()
def schema() -> None:
    """JSON Schema of a recipe file, for editors."""
    from hone.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
