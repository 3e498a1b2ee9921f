"""`hone adapters`: what has been published, and the aliases that point at it."""

import json
from typing import Annotated, Any

import typer

from cluster.cli_releases import diff, history, print_move, promote, rollback
from cluster.cli_run import HomeOption
from cluster.terminal import number, output, size, table
from hone.errors import RegistryError
from hone.methods import HOW_SERVED
from hone.tasks import TASKS

adapters = typer.Typer(help="Published adapters and the aliases that they answer under.", no_args_is_help=True)
adapters.command()(promote)
adapters.command()(rollback)
adapters.command()(history)
adapters.command()(diff)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Ref = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Adapter, version or alias.", show_default=False)]


@adapters.command("list")
def list_(home: HomeOption = None, as_json: AsJson = False) -> None:
    """Every published version, and every alias."""
    registry = _registry(home)
    found, aliases = registry.adapters(), registry.aliases()
    if as_json:
        listed = [{**_described(m), "aliases": [a for a, target in aliases.items() if target == str(m.ref)]} for m in found]
        output().print_json(json.dumps({"adapters": listed, "aliases": aliases}))
        return
    if not found:
        output().print("nothing published yet; `hone train RECIPE` publishes what it trains", markup=False)
        return
    states = {alias: registry.alias(alias).current for alias in aliases}
    rows = [
        (
            str(m.ref),
            m.task,
            m.method,
            m.served,
            m.base.name,
            _main_metric(m.metrics),
            size(sum(file.bytes for file in m.files.values())),
            m.created_at[:16].replace("T", " "),
            ", ".join(filter(None, (_part_in(state, alias, str(m.ref)) for alias, state in states.items()))),
        )
        for m in found
    ]
    output().print(table(("ADAPTER", "TASK", "METHOD", "SERVED", "BASE", "RESULT", "SIZE", "PUBLISHED", "ALIASES"), rows))


@adapters.command()
def show(ref: Ref, home: HomeOption = None, as_json: AsJson = False) -> None:
    """One adapter: what it was made of, how well it does, where it is."""
    registry = _registry(home)
    manifest = registry.resolve(ref)
    folder = registry.path(manifest.ref)
    if as_json:
        output().print_json(json.dumps({**_described(manifest), "folder": str(folder)}))
        return
    lineage = manifest.lineage
    rows = [
        ("adapter", str(manifest.ref)),
        ("kind", f"{manifest.kind}, {manifest.task}, {manifest.method}, {manifest.dtype}"),
        ("served", f"{HOW_SERVED[manifest.served]}, at {TASKS[manifest.task].route}"),
        ("base", f"{manifest.base.name}" + (f" at {manifest.base.revision}" if manifest.base.revision else "")),
        ("base fingerprint", manifest.base.fingerprint[:16]),
        ("digest", manifest.digest[:16]),
        ("published", manifest.created_at),
        ("run", lineage.run_id),
        ("trial", json.dumps(lineage.trial) if lineage.trial else ""),
        ("data digest", lineage.data_digest[:16]),
        ("labels", ", ".join(manifest.labels or [])),
        *((name, number(value)) for name, value in manifest.metrics.items()),
        ("card", str(folder / "README.md")),
    ]
    output().print(table(("", ""), [row for row in rows if row[1]]))
    files = [(name, size(entry.bytes), entry.sha256[:16]) for name, entry in manifest.files.items()]
    output().print(table(("FILE", "SIZE", "SHA-256"), files))


@adapters.command()
def verify(ref: Ref, home: HomeOption = None) -> None:
    """Compare every file with the digests that were published."""
    registry = _registry(home)
    manifest = registry.resolve(ref)
    registry.verify(manifest.ref)
    output().print(f"{manifest.ref}: all {len(manifest.files)} files are as published", markup=False)


@adapters.command()
def alias(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Alias, such as prod.", show_default=False)],
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="NAME@VERSION it points at.", show_default=False)] = None,
    remove: Annotated[bool, typer.Option("--rm", help="Forget the alias.")] = False,
    home: HomeOption = None,
) -> None:
    """Let one version answer everything under an alias, in one step (see `promote`); `--rm` forgets it and its history."""
    registry = _registry(home)
    if remove == (target is not None):
        raise RegistryError(f"alias {name}: give either a TARGET to point it at, or --rm to forget it")
    if target is None:
        registry.remove_alias(name)
        output().print(f"{name}: forgotten", markup=False)
        return
    before = registry.alias(name)
    registry.set_alias(name, target)
    print_move(name, before, registry.alias(name))


@adapters.command()
def rm(ref: Ref, home: HomeOption = None) -> None:
    """Delete one version's files. Its number is never used again."""
    from hone.ids import AdapterRef

    parsed = AdapterRef.parse(ref)
    _registry(home).remove(parsed)
    output().print(f"{parsed}: removed", markup=False)


def _registry(home: Any) -> Any:
    from hone.registry import Registry
    from hone.storage import Home

    return Registry(Home(home))


def _described(manifest: Any) -> dict[str, Any]:
    return {"ref": str(manifest.ref), "digest": manifest.digest, **manifest.model_dump(mode="json")}


def _part_in(state: Any, alias: str, ref: str) -> str:
    """`prod`, `prod 10%` or `prod (shadow)`; nothing where the alias does not know the version."""
    from hone.releases import percent

    if state.shadow and state.shadow.version == ref:
        return f"{alias} (shadow)"
    weight = state.weight_of(ref)
    return alias if weight == 1 else f"{alias} {percent(weight)}" if weight else ""


def _main_metric(metrics: dict[str, float]) -> str:
    """The validation metric that says most, beside the base model's own where that was measured."""
    for name in ("eval_accuracy", "eval_loss", "loss"):
        if name in metrics:
            before = metrics.get(f"base_{name}")
            return f"{name} {number(metrics[name])}" + (f" (base {number(before)})" if before is not None else "")
    return ""
