"""Writes the figures of results/*.json into README.md, between `<!-- figures -->` marks, and those of every method into
docs/methods-compared.md, so that none is typed by hand."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
METHODS_PAGE = README.parent / "docs" / "methods-compared.md"
START, END = "<!-- figures -->", "<!-- /figures -->"


def main() -> int:
    """Rewrite the tables; with --check say only whether they are up to date."""
    text = README.read_text()
    fresh = with_tables(text)
    if "--check" in sys.argv:
        return int(text != fresh or METHODS_PAGE.read_text() != methods_page())
    README.write_text(fresh)
    page = methods_page()
    if page:
        METHODS_PAGE.write_text(page)
    return 0


def with_tables(readme: str) -> str:
    """The README with its tables made anew."""
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n\n{tables()}\n\n{END}{tail}"


def tables() -> str:
    """Every result that there is, as Markdown."""
    makers = {
        "step_time": _step_time,
        "gpu": _gpu,
        "packing": _packing,
        "preparing": _preparing,
        "preparing_memory": _preparing_memory,
        "accuracy": _accuracy,
        "forgetting": _forgetting,
        "transfer": _transfer,
        "new_version": _new_version,
        "adapters": _adapters,
        "start": _start,
        "restart": _restart,
        "checkpoints": _checkpoints,
        "plan_memory": _plan_memory,
        "engine": _engine,
        "arrivals": _arrivals,
        "ingress": _ingress,
        "served_memory": _served_memory,
    }
    found = [(name, RESULTS / f"{name}.json") for name in makers]
    return "\n\n".join(makers[name](json.loads(path.read_text())) for name, path in found if path.exists())


def _step_time(result: dict[str, Any]) -> str:
    rows = [
        f"| {name.split('_')[0]} | {f['ray_train']['median'] * 1000:.0f} ms | {f['torchrun']['median'] * 1000:.0f} ms "
        f"| {f['ratio']['median']:.3f} ({f['ratio']['min']:.3f} to {f['ratio']['max']:.3f}) |"
        for name, f in result["figures"].items()
    ]
    header = ["| workers | Ray Train | torchrun | ratio, median (spread) |", "| --- | --- | --- | --- |"]
    return "\n".join(["**Step time under Ray Train against the same loop under torchrun**", "", *header, *rows, "", _footer(result)])


def _gpu(result: dict[str, Any]) -> str:
    rows = []
    for shape, figures in result["figures"].items():
        for name, figure in figures.items():
            if "failed" in figure:
                rows.append(f"| {shape.upper()} | {name} | {figure['failed']} | | |")
            elif "mfu" in figure:
                rate, mfu = figure["tokens_a_second"]["median"], figure["mfu"]["median"]
                rows.append(f"| {shape.upper()} | {name} | {rate:,.0f} | {mfu:.1%} | {figure['peak_gib']:.1f} GiB |")
            else:
                rows.append(f"| {shape.upper()} | {name} | {_spread(figure)} times | | |")
    header = ["| shape | run | tokens a second | MFU | peak memory |", "| --- | --- | --- | --- | --- |"]
    title = f"**Llama in bf16 on rows of {result['notes']['row_tokens']:,} tokens, {result['environment']['gpu']}**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _packing(result: dict[str, Any]) -> str:
    figures = result["figures"]
    others = {"hone_padded": "hone, padded", "trl_padded": "TRL SFTTrainer, padded", "trl_packed": "TRL SFTTrainer, packed"}
    rows = [f"| {label} | {figures[name]['median']:,.0f} | {_spread(figures[f'to_{name}'])} |" for name, label in others.items()]
    header = ["| against | its useful tokens a second | hone packed, times as many (spread) |", "| --- | --- | --- |"]
    title = "**LoRA on math word problems: rows end to end, attention within each, logits at targets only**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _restart(result: dict[str, Any]) -> str:
    rows = [f"| {name} | {f['median']:.1f} s ({f['min']:.1f} to {f['max']:.1f}) |" for name, f in result["figures"].items()]
    title = "**From SIGKILL of a worker to the next new step, and from the command to the first one**"
    return "\n".join([title, "", "| | median (spread) |", "| --- | --- |", *rows, "", _footer(result)])


def _checkpoints(result: dict[str, Any]) -> str:
    figures, notes = result["figures"], result["notes"]
    rows = [
        f"| time of all steps, to the same run without | {_spread(figures['ratio'])} |",
        f"| share of time that training stood still | {figures['waits']['median']:.2%} |",
        f"| for each checkpoint | {figures['wait_ms']['median']:.0f} ms |",
        f"| written beside the training | {figures['mib']['median']:.0f} MiB in {figures['written_s']['median']:.1f} s |",
    ]
    title = f"**A checkpoint of weights and moments every {notes['checkpoint_every']} steps of full fine-tuning**"
    return "\n".join([title, "", "| | median (spread) |", "| --- | --- |", *rows, "", _footer(result)])


def _engine(result: dict[str, Any]) -> str:
    rows = [
        f"| {length} | {f['engine']['median']:,.0f} | {_spread(f['to_peft_mixed'])} | {_spread(f['to_one_after_another'])} "
        f"| {_spread(f['to_engine_without_adapters'])} |"
        for length, f in result["figures"].items()
    ]
    notes = result["notes"]
    header = [
        "| prompt tokens | tokens a second | times PEFT's mixed batch | times one adapter after another | times the engine on the base |",
        "| --- | --- | --- | --- | --- |",
    ]
    title = f"**{notes['rows']} answers at once, of {notes['adapters']} LoRA adapters: the slot engine (ratios: median and spread)**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _arrivals(result: dict[str, Any]) -> str:
    heavy, to, light = result["figures"].values()
    rows = [
        f"| {name} | {rate['median']:.0f} | {_spread(to[name]) if name in to else ''} "
        f"| {light[name]['p50']:.3f} s | {light[name]['p99']:.3f} s |"
        for name, rate in heavy.items()
    ]
    notes = result["notes"]
    header = [
        f"| | tokens a second at {notes['heavy']['a second']:g} requests a second | hone, times as many (spread) "
        f"| first token at {notes['light']['a second']:g} a second, p50 | p99 |",
        "| --- | --- | --- | --- | --- |",
    ]
    title = f"**Poisson arrivals over HTTP: hone with {notes['adapters']} LoRA adapters, `transformers serve` with the base alone**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _ingress(result: dict[str, Any]) -> str:
    figures = result["figures"]
    said = {
        "engine": "the engine, in the same process",
        "handle": "a replica, through Ray Serve's handle",
        "http": "over HTTP",
        "refused": "over HTTP, refused by the ingress",
    }
    rows = [
        f"| {label} | {figures[f'{name} (ms)']['median']:.1f} ms | {figures[f'{name} (requests/s)']['median']:.0f} |"
        for name, label in said.items()
    ]
    header = [f"| one token | one after another | requests a second, {result['notes']['at_once']} at once |", "| --- | --- | --- |"]
    return "\n".join(["**What HTTP adds to an answer**", "", *header, *rows, "", _footer(result)])


def _served_memory(result: dict[str, Any]) -> str:
    figures = dict(result["figures"])
    done = figures.pop("after requests")
    shown = [0, *range(1, len(done), 2)]
    header = ["| MiB after | " + " | ".join(f"{done[n]:,}" for n in shown) + " |", "| --- |" + " --- |" * len(shown)]
    rows = [f"| {name} | " + " | ".join(f"{values[n]:.0f}" for n in shown) + " |" for name, values in figures.items()]
    return "\n".join(["**Memory over requests by HTTP, every prompt another**", "", *header, *rows, "", _footer(result)])


def _preparing(result: dict[str, Any]) -> str:
    figures = result["figures"]
    rows = [
        f"| tokens a second, to `datasets.map` with as many processes | {_spread(figures['to_datasets'])} |",
        f"| the same data once more, times as fast | {figures['again_hone']['median']:.0f} |",
    ]
    title = "**Preparing chat rows, checked by the gate as they are tokenised**"
    return "\n".join([title, "", "| | ratio (spread) |", "| --- | --- |", *rows, "", _footer(result)])


def _preparing_memory(result: dict[str, Any]) -> str:
    sizes = {name: f for name, f in result["figures"].items() if name != "ratio"}
    rows = [f"| {f['tokens']:,} | {f['rows']:,} | {f['peak_mib']:,} MiB |" for f in sizes.values()]
    header = ["| tokens | rows | peak memory of all processes |", "| --- | --- | --- |"]
    title = f"**Preparing ten times as much takes {result['figures']['ratio']:.2f} times the memory**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _spread(figure: dict[str, Any]) -> str:
    return f"{figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})"


def _accuracy(result: dict[str, Any]) -> str:
    rows = [
        f"| {method} | {_runs(f['hone'])} | {_runs(f['plain'])} | {f['difference_points']:+.1f} |"
        for method, f in result["figures"].items()
        if "difference_points" in f
    ]
    header = ["| method | hone, 2 workers, ZeRO-2 | plain torch loop | difference, points |", "| --- | --- | --- | --- |"]
    title = "**Validation accuracy after 3 epochs, mean (each seed): movie reviews on MiniLM-L6**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _runs(by_seed: dict[str, list[float]]) -> str:
    final = [run[-1] for run in by_seed.values()]
    return f"{statistics.mean(final):.3f} ({', '.join(f'{value:.3f}' for value in final)})"


def _forgetting(result: dict[str, Any]) -> str:
    measured = ("eval_loss", "retain_loss_increase", "retain_kl")
    rows = [
        f"| {variant} | {f['mean']['eval_loss_before']:.2f} | {' | '.join(_mean_and_range(f, name) for name in measured)} |"
        for variant, f in result["figures"].items()
    ]
    header = [
        "| guard | target loss before | after, mean (each seed's range) | rise of the loss on what was known | KL from the base there |",
        "| --- | --- | --- | --- | --- |",
    ]
    title = "**Forgetting: a Llama that has read Shakespeare learns word problems (nats a token)**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _mean_and_range(figure: dict[str, Any], name: str) -> str:
    values = [run[name] for run in figure["seeds"].values()]
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _transfer(result: dict[str, Any]) -> str:
    parts = ["**Accuracy on half of the classes: fine-tuned from the other half, and from scratch, by rows to learn from**", ""]
    for kind, starts in result["figures"].items():
        sizes = sorted(map(int, starts["pretrained"]))
        parts += [f"| {kind.replace('_', ' ')} | {' | '.join(f'{n:,}' for n in sizes)} |", "| --- |" + " --- |" * len(sizes)]
        for start, said in (("pretrained", "fine-tuned"), ("scratch", "from scratch")):
            means = [statistics.mean(starts[start][str(n)].values()) for n in sizes]
            parts.append(f"| {said} | {' | '.join(f'{value:.3f}' for value in means)} |")
        parts.append("")
    parts += [
        "In as many steps from either start: 150 for pictures, 120 for spoken digits, in which a sound model learns little from nothing.",
        "",
    ]
    return "\n".join([*parts, "![accuracy by rows](benchmarks/results/transfer.png)", "", _footer(result)])


def methods_page() -> str:
    """docs/methods-compared.md, where the methods have been measured."""
    path = RESULTS / "methods.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    figures = result["figures"]
    rows = [
        f"| {name} | {f['accuracy']:.3f} | {f['trained_parameters']:,} | {f['step_ms']['median']:.0f} "
        f"({f['step_ms']['min']:.0f} to {f['step_ms']['max']:.0f}) | {f['peak_mib']:,.0f} | {f['settings']['optim']['learning_rate']:g} |"
        for name, f in figures.items()
    ]
    epochs = next(iter(figures.values()))["epochs"]
    return "\n".join(
        [
            "# Every method on the same data",
            "",
            "Sentiment of 8,530 sentences of film reviews on MiniLM-L6 (22.7 million parameters); accuracy on 1,066 other ones, at the",
            f"best validation in {epochs:g} epochs (32 rows a step, 267 steps an epoch). One seed: two part by a point, and so few steps",
            "are too few for prompts. One process on all cores.",
            "",
            "| method | accuracy | parameters that train | ms a step, median (spread) | peak memory, MiB | learning rate |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"`python -m benchmarks.methods --epochs {epochs:g}`, and for the times {_footer(result)}",
            "",
        ]
    )


def _new_version(result: dict[str, Any]) -> str:
    rows = [
        f"| {name.replace('_', ' ')} | {f['median']:.2f} s ({f['min']:.2f} to {f['max']:.2f}) |" for name, f in result["figures"].items()
    ]
    header = ["| | seconds to one token over HTTP, median (spread) |", "| --- | --- |"]
    title = "**A version published while the server runs: from publishing to its first answer**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _adapters(result: dict[str, Any]) -> str:
    figures = dict(result["figures"])
    cold, warm, ratio = (figures.pop(name) for name in ("cold", "warm", "cold to warm, medians"))
    resident = figures.pop("bytes of a resident adapter")
    [(name, zipf)] = figures.items()
    shares = ", ".join(f"{share:.0%} {place}" for place, share in sorted(zipf["found (shares)"].items()))
    rows = [
        f"| first token, adapter on the device | {warm['median'] * 1000:.0f} ms ({warm['min'] * 1000:.0f} to {warm['max'] * 1000:.0f}) |",
        f"| never loaded before: files read, digested and proven | {cold['median'] * 1000:.0f} ms ({cold['min'] * 1000:.0f} to "
        f"{cold['max'] * 1000:.0f}), {ratio:.2f} times |",
        f"| {name}, 64 on the device and 256 in memory, 8 requests at a time: found | {shares} |",
        f"| first token of those, median and 99% | {zipf['p50'] * 1000:.0f} ms, {zipf['p99'] * 1000:.0f} ms |",
        f"| an adapter of {zipf['bytes of an adapter'] / 2**20:.2f} MiB makes the process larger by | {resident / 2**20:.2f} MiB |",
    ]
    header = ["| rank 16 on a Llama of hidden size 256, prompts of 128 tokens | |", "| --- | --- |"]
    return "\n".join(["**Adapters that are not on the device, and a thousand on one replica**", "", *header, *rows, "", _footer(result)])


def _start(result: dict[str, Any]) -> str:
    figures = result["figures"]
    rows = [
        f"| {said} | {figures[f'hone{key}']['median']:.1f} s | {figures[f'plain{key}']['median']:.1f} s "
        f"| {_spread(figures[f'ratio{key}'])} |"
        for said, key in (("as on a new node: what DeepSpeed compiles is not there yet", ", new machine"), ("compiled before", ""))
    ]
    header = [
        "| LoRA, ZeRO-2, two workers | hone | Ray Train, transformers' Trainer, DeepSpeed | ratio (spread) |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join(["**From the command to the first step done**", "", *header, *rows, "", _footer(result)])


def _plan_memory(result: dict[str, Any]) -> str:
    rows = [f"| {name} | {f['estimated']:,} MiB | {f['measured']:,} MiB | {f['ratio']:.2f} |" for name, f in result["figures"].items()]
    header = ["| random Llama, two workers | estimated | measured | ratio |", "| --- | --- | --- | --- |"]
    title = "**What `hone plan` says of a worker's memory, and the most that real workers took (resident set)**"
    return "\n".join([title, "", *header, *rows, "", _footer(result)])


def _footer(result: dict[str, Any]) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("ray", "torch", "deepspeed", "transformers", "peft"))
    return f"`{result['command']}` on {e['gpu'] or e['cpu']}, {e['cores']} cores; {versions}."


if __name__ == "__main__":
    sys.exit(main())
