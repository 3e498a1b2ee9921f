"""What checkpoints cost the training that they are made beside: a run with them against the same run without, in turn.

Every weight of a random Llama is tuned in one process on all cores, a checkpoint of weights and moments every ten steps. `waits` is how
long training stood still for them, as a share of its steps' time; the ratio of the two runs has what writing takes from it besides.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.harness import Figures, ratios, save, summary
from benchmarks.here import run_here
from hone.recipe import Recipe, parse_recipe
from hone.run_folder import read_events
from hone.storage import Home
from tests.tiny import make_llama

STEPS, EVERY = 41, 10


def main() -> None:
    """Measure and write results/checkpoints.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    args = parser.parse_args()
    measured: Figures = {name: [] for name in ("with", "without", "waits", "wait_ms", "mib", "written_s")}
    with tempfile.TemporaryDirectory() as scratch:
        base, rows = make_llama(Path(scratch, "base"), hidden_size=args.hidden), Path(scratch, "rows.jsonl")
        rows.write_text("".join(json.dumps({"prompt": f"what is {n}? " * 20, "completion": "no idea " * 40}) + "\n" for n in range(400)))
        for repeat in range(args.repeats):
            for name, every in (("with", EVERY), ("without", STEPS)):
                recipe = _recipe(base, rows, every)
                ran = run_here(recipe, home=Home(Path(scratch, "home")), name=f"{name}-{repeat}")
                measured[name].append(ran.seconds)
                written = [event for event in read_events(ran.job.folder) if event["event"] == "checkpoint"]
                if written:
                    waited = sum(event["waited_s"] for event in written)
                    measured["waits"].append(waited / (ran.seconds + waited))
                    measured["wait_ms"].append(1000 * waited / len(written))
                    measured["mib"].append(written[-1]["bytes"] / 2**20)
                    measured["written_s"].append(written[-1]["written_s"])
                print(f"round {repeat + 1}/{args.repeats}  {name}: {ran.seconds:.1f} s", flush=True)  # noqa: T201
    figures = {**{name: summary(values) for name, values in measured.items()}, "ratio": ratios(measured, of="with", to="without")}
    print(save("checkpoints", unit="seconds", figures=figures, notes={"steps": STEPS, "checkpoint_every": EVERY}))  # noqa: T201


def _recipe(base: Path, rows: Path, every: int) -> Recipe:
    return parse_recipe(
        {
            "name": "checkpoints",
            "task": "chat",
            "base": str(base),
            "data": {"train": str(rows), "validation_fraction": 0.0, "max_length": 256, "near_duplicate_rows": 0, "stop_on": []},
            "method": {"type": "full"},
            "train": {"max_steps": STEPS, "num_train_epochs": 100, "global_batch_size": 16, "save_steps": every},
        },
        where="checkpoints",
    )


if __name__ == "__main__":
    main()
