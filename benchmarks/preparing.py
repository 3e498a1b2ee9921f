"""Preparing chat rows: hone's tokenising, with all that its gate looks for, against `datasets.map`; and the same once more from the cache.

math_word_problems, each row many times over and numbered, becomes token ids and labels on disk (the answers alone are learnt), by two
processes: hone's over Ray Data, and `datasets.map` with num_proc=2 over the function that such scripts have, which writes the template
and tokenises the whole row and its prompt. Both read JSON Lines and start from an empty cache. Libraries are loaded and Ray is up before
the clock starts. Needs ../shared/data beside the checkout, and the extra `bench`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import interleave, ratios, save, summary
from benchmarks.word_problems import conversations, find_data, make_base

PROCESSES = 2
COPIES = 24


def main() -> None:
    """Measure, or (`--child`) be one of the measured processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=("hone", "datasets"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps({"hone": _hone, "datasets": _datasets}[args.child](args.folder)))  # noqa: T201
        return
    again: dict[str, list[float]] = {"hone": [], "datasets": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_base(folder / "base", find_data())
        rows = _write_rows(folder / "rows.jsonl", find_data(), copies=COPIES)
        _write_rows(folder / "few.jsonl", find_data(), copies=2)
        measured = interleave({name: partial(_tokens_a_second, name, folder, again) for name in again}, repeats=args.repeats)
    figures: dict[str, Any] = {name: summary(values) for name, values in measured.items()}
    figures["to_datasets"] = ratios(measured, of="hone", to="datasets")
    figures["again_hone"] = summary(again["hone"])
    figures["again_datasets"] = summary(again["datasets"])
    path = save(
        "preparing",
        unit="tokens a second; again_: times faster from the cache",
        figures=figures,
        notes={"rows": rows, "copies": COPIES, "processes": PROCESSES},
    )
    print(f"{figures['to_datasets']['median']:.2f} times datasets.map; again {figures['again_hone']['median']:.0f} times faster", path)  # noqa: T201


def _write_rows(path: Path, data: Path, *, copies: int) -> int:
    rows = conversations(data)
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for n, (question, answer) in enumerate(rows):
                asked = {**question, "content": f"{copy}.{n} {question['content']}"}
                file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    return len(rows) * copies


def _tokens_a_second(name: str, folder: Path, again: dict[str, list[float]]) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        for given in ("base", "rows.jsonl", "few.jsonl"):
            (Path(scratch) / given).symlink_to(folder / given)
        command = [sys.executable, "-m", "benchmarks.preparing", "--child", name, "--folder", scratch]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        said = json.loads(done.stdout.splitlines()[-1])
    again[name].append(said["first_s"] / said["second_s"])
    return float(said["tokens"] / said["first_s"])


def _hone(folder: Path) -> dict[str, float]:
    import ray

    from hone.base_model import find_base_model
    from hone.recipe import parse_recipe
    from hone.storage import Home
    from training.data import prepare_data
    from training.token_rows import TokenRows

    data = {"train": str(folder / "rows.jsonl"), "validation_fraction": 0.01}
    recipe = parse_recipe({"name": "b", "task": "chat", "base": str(folder / "base"), "data": data}, where="preparing")
    home = Home(folder / "home")
    base = find_base_model(recipe.base, home=home)
    ray.init(address="local", num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False, logging_level="warning")
    few = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": str(folder / "few.jsonl")})})
    began = time.perf_counter()
    prepare_data(few, base, home=home)  # its workers have loaded their libraries, as those of datasets.map are forked with them
    warm_up_s = time.perf_counter() - began
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        prepared = prepare_data(recipe, base, home=home)
        seconds.append(time.perf_counter() - began)
    tokens = sum(int(TokenRows(prepared, part).lengths.sum()) for part in ("train", "validation"))
    ray.shutdown()
    return {"first_s": seconds[0], "second_s": seconds[1], "tokens": tokens, "warm_up_s": warm_up_s}


def _datasets(folder: Path) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        rows: Any = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "cache"))
        made = rows.map(_encode, batched=True, num_proc=PROCESSES, remove_columns=rows.column_names, fn_kwargs={"tokenizer": tokenizer})
        seconds.append(time.perf_counter() - began)
    tokens = sum(len(ids) for batch in made.iter(1000) for ids in batch["input_ids"])
    return {"first_s": seconds[0], "second_s": seconds[1], "tokens": tokens}


def _encode(batch: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Ids of the whole row, and labels that leave out its prompt."""
    whole = [tokenizer.apply_chat_template(m, tokenize=False) for m in batch["messages"]]
    prompts = [tokenizer.apply_chat_template(m[:-1], tokenize=False, add_generation_prompt=True) for m in batch["messages"]]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    starts = map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"])
    return {"input_ids": ids, "labels": [[-100] * start + row[start:] for row, start in zip(ids, starts, strict=True)]}


if __name__ == "__main__":
    main()
