"""Fine-tuning against training from scratch: pictures and spoken digits, by how many rows there are to learn from.

A small vision transformer and a small audio spectrogram transformer are pre-trained on half of the classes of ../shared/data/pictures and
../shared/data/spoken_digits, then learn the other half: from what was pre-trained, and from the weights that pre-training began with. Same
rows, same steps. Writes results/transfer.json and results/transfer.png.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.harness import RESULTS, last_figures, save
from benchmarks.here import run_here
from hone.recipe import parse_recipe
from hone.storage import Home

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS: dict[str, dict[str, Any]] = {
    "pictures": {
        "task": "image-classification",
        "pretraining_epochs": 50,
        "rows": (50, 100, 250, 500, 1000, 2500),
        "steps": 150,
        "augment": {"image": {"crop_scale": [0.7, 1.0]}},
    },
    "spoken_digits": {
        "task": "audio-classification",
        "pretraining_epochs": 120,
        "rows": (15, 30, 75, 150, 300, 600),
        "steps": 120,
        "augment": {"audio": {"noise_snr_db": [20.0, 40.0], "time_mask_frames": 8, "freq_mask_bins": 6}},
    },
}
RATES = {
    "pictures": {"pretrained": 3e-4, "scratch": 3e-4},
    "spoken_digits": {"pretrained": 1e-3, "scratch": 1e-3},
}
"""Learning rate from each start: of 1e-4, 3e-4 and 1e-3 the best over a few numbers of rows, one seed."""
STARTS = ("pretrained", "scratch")


def main() -> None:
    """Measure what is asked for, and draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", default=[0, 1, 2], type=int)
    parser.add_argument("--bases", type=Path, help="a folder where what was pre-trained stays, and is found by the next run")
    args = parser.parse_args()
    if not DATA.is_dir():
        sys.exit("this benchmark needs ../shared/data")
    with tempfile.TemporaryDirectory() as name:
        for kind in args.sets:
            _measure(kind, (args.bases or Path(name)) / kind, args.seeds)
    _draw(last_figures("transfer"))


def _measure(kind: str, scratch: Path, seeds: list[int]) -> None:
    bases = _bases(kind, scratch)
    for seed in seeds:
        for rows in SETS[kind]["rows"]:
            for start in STARTS:
                reached = _learn(kind, scratch, bases[start], rows=rows, seed=seed, start=start)
                print(kind, start, rows, "rows, seed", seed, f"{reached:.3f}", flush=True)  # noqa: T201
                figures = last_figures("transfer")  # another process may measure the other set meanwhile
                figures.setdefault(kind, {}).setdefault(start, {}).setdefault(str(rows), {})[str(seed)] = reached
                save("transfer", unit="accuracy on validation rows of the other half of the classes", figures=figures)


def _bases(kind: str, scratch: Path) -> dict[str, Path]:
    """Random weights, and what pre-training on the first half of the classes makes of them."""
    random, pretrained = scratch / "random", scratch / "home" / "runs" / "pretraining" / "export"
    if (pretrained / "preprocessor_config.json").exists():
        return {"pretrained": pretrained, "scratch": random}
    scratch.mkdir(parents=True)
    (_make_vit if kind == "pictures" else _make_ast)(random)
    first, second = _halves(kind)
    for part in ("train", "val"):
        _write(kind, part, first, scratch / f"first-{part}.parquet")
        _write(kind, part, second, scratch / f"second-{part}.parquet")
    settings = SETS[kind]
    recipe = {
        "name": "pretraining",
        "task": settings["task"],
        "base": str(random),
        "data": {
            "train": str(scratch / "first-train.parquet"),
            "validation": str(scratch / "first-val.parquet"),
            "augment": settings["augment"],
            "max_seconds": 1.0,
            "stop_on": [],
        },
        "method": {"type": "full"},
        "optim": {"learning_rate": 1e-3, "weight_decay": 0.05, "lr_scheduler_type": "cosine"},
        "train": {"num_train_epochs": settings["pretraining_epochs"], "global_batch_size": 64, "micro_batch_size": 64},
        "zero": {"stage": 0},
    }
    ran = run_here(parse_recipe(recipe, where="transfer"), home=Home(scratch / "home"), name="pretraining")
    print(kind, "pre-trained on half of the classes:", f"{ran.metrics['eval_accuracy']:.3f}", flush=True)  # noqa: T201
    (pretrained / "preprocessor_config.json").write_bytes((random / "preprocessor_config.json").read_bytes())
    return {"pretrained": pretrained, "scratch": random}


def _learn(kind: str, scratch: Path, base: Path, *, rows: int, seed: int, start: str) -> float:
    """Accuracy on the second half of the classes after learning from so many rows of them."""
    table = pq.read_table(scratch / "second-train.parquet")
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(table))[:rows]
    while len(pc.unique(table["label"].take(chosen))) < len(pc.unique(table["label"])):  # some of every class
        chosen = generator.permutation(len(table))[:rows]
    train = scratch / f"{rows}-{seed}.parquet"
    pq.write_table(table.take(chosen), train)
    settings = SETS[kind]
    recipe = {
        "name": "transfer",
        "task": settings["task"],
        "base": str(base),
        "data": {"train": str(train), "validation": str(scratch / "second-val.parquet"), "max_seconds": 1.0, "stop_on": []},
        "method": {"type": "full"},
        "optim": {"learning_rate": RATES[kind][start], "weight_decay": 0.05, "lr_scheduler_type": "cosine"},
        "train": {
            "max_steps": settings["steps"],
            "num_train_epochs": settings["steps"],
            "global_batch_size": 32,
            "micro_batch_size": 32,
            "eval_steps": settings["steps"] // 3,
            "seed": seed,
        },
        "guard": {"metric": "eval_accuracy", "mode": "max"},
        "zero": {"stage": 0},
    }
    with tempfile.TemporaryDirectory() as home:
        ran = run_here(parse_recipe(recipe, where="transfer"), home=Home(home), name="transfer")
    return float(ran.metrics["eval_accuracy"])


def _halves(kind: str) -> tuple[list[Any], list[Any]]:
    labels = sorted(set(pq.read_table(DATA / kind / "train.parquet", columns=["label"])["label"].to_pylist()))
    return labels[::2], labels[1::2]


def _write(kind: str, part: str, labels: Iterable[Any], path: Path) -> None:
    table = pq.read_table(DATA / kind / f"{part}.parquet")
    pq.write_table(table.filter(pc.is_in(table["label"], pa.array(labels, table["label"].type))), path)


def _make_vit(folder: Path) -> None:
    import torch
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=4, hidden_act="gelu"
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)


def _make_ast(folder: Path) -> None:
    import torch
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    ASTFeatureExtractor(num_mel_bins=64, max_length=96, sampling_rate=8000).save_pretrained(folder)
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=96,
        num_mel_bins=64,
    )
    ASTModel(config).save_pretrained(folder)


def _draw(figures: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(figures), figsize=(5.5 * len(figures), 4), squeeze=False)
    for panel, (kind, starts) in zip(panels[0], figures.items(), strict=True):
        for start, of_rows in starts.items():
            rows = sorted(map(int, of_rows))
            values = [list(of_rows[str(n)].values()) for n in rows]
            middle = [statistics.mean(each) for each in values]
            [line] = panel.plot(rows, middle, marker="o", label={"pretrained": "fine-tuned", "scratch": "from scratch"}[start])
            panel.fill_between(rows, [min(each) for each in values], [max(each) for each in values], alpha=0.2, color=line.get_color())
        panel.set(xscale="log", xlabel="rows to learn from", ylabel="accuracy", title=kind.replace("_", " "), ylim=(0, 1))
        panel.set_xticks(rows, [f"{n:,}" for n in rows], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "transfer.png", dpi=120)
    print(json.dumps({"drawn": str(RESULTS / "transfer.png")}))  # noqa: T201


if __name__ == "__main__":
    main()
