"""`hone adapters promote|rollback|history|diff`: which versions answer under an alias, and what is between two of them."""

import json
from typing import Annotated, Any

import typer

from cluster.cli_run import HomeOption
from cluster.terminal import number, output, size, table
from hone.errors import RegistryError

Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="Alias, such as prod.", show_default=False)]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="A word for the history.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AdapterArg = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Adapter, version or alias.", show_default=False)]


def promote(
    alias: Alias,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="NAME@VERSION that is to answer.", show_default=False)],
    share: Annotated[
        str, typer.Option(metavar="SHARE", help="Its share of the requests, such as 10%; the others keep the rest in proportion.")
    ] = "100%",
    sticky: Annotated[
        bool | None, typer.Option("--sticky/--no-sticky", help="A `user` always gets the same version.", show_default=False)
    ] = None,
    shadow: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION[:SHARE]",
            help="Send it copies of so many requests (all, by default) and throw its answers away; `none` ends it.",
            show_default=False,
        ),
    ] = None,
    rollback_on: Annotated[
        str | None,
        typer.Option(
            metavar="RATE[:SECONDS[:REQUESTS]]",
            help="Go back when so many of a version's requests fail, such as 5%, in so many seconds (60), of so many at least (20); `none` "
            "ends it.",
            show_default=False,
        ),
    ] = None,
    why: Why = "",
    force: Annotated[
        bool, typer.Option("--force", help="Move whatever `publish.gate` of its recipe says, or to another base; the history keeps it.")
    ] = False,
    home: HomeOption = None,
) -> None:
    """Let a version answer under an alias, for all its requests or a share, if its gate lets it. What is not said stays as it was."""
    from hone.promotion import AS_IT_WAS, Wishes
    from hone.promotion import promote as promote_

    wishes = Wishes(
        share=_share(share, "--share"),
        sticky=AS_IT_WAS if sticky is None else sticky,
        shadow=AS_IT_WAS if shadow is None else _shadow(shadow),
        rollback=AS_IT_WAS if rollback_on is None else _policy(rollback_on),
    )
    registry = _registry(home)
    before = registry.alias(alias)
    moved = promote_(registry, alias, version, wishes=wishes, force=force, why=why)
    print_move(alias, before, moved)


def rollback(
    alias: Alias,
    to: Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of the state, by `history`.", show_default=False)] = None,
    why: Why = "",
    home: HomeOption = None,
) -> None:
    """Bring back what the alias meant before, or state N."""
    from hone.promotion import roll_back

    registry = _registry(home)
    before = registry.alias(alias)
    print_move(alias, before, roll_back(registry, alias, to=to, why=why))


def history(alias: Alias, home: HomeOption = None, as_json: AsJson = False) -> None:
    """Every state that an alias had: what answered, since when, by whose doing and why."""
    from hone.errors import UnknownAdapterError

    registry = _registry(home)
    found = registry.alias(alias)
    if found is None:
        raise UnknownAdapterError(f"no alias {alias!r}; there are: {', '.join(registry.aliases()) or 'none'}")
    if as_json:
        states = [{"number": n, **state.model_dump(mode="json")} for n, state in enumerate(found.history, start=1)]
        output().print_json(json.dumps({"alias": alias, "history": states}))
        return
    rows = [
        (str(n), state.at[:19].replace("T", " "), state.says(), state.by, _reason(state)) for n, state in enumerate(found.history, start=1)
    ]
    output().print(table(("STATE", "SINCE", "ANSWERS", "BY", "WHY"), rows))


def diff(a: AdapterArg, b: AdapterArg, home: HomeOption = None, as_json: AsJson = False) -> None:
    """What differs between two versions: recipe, data, base, method, metrics, sizes."""
    from hone.adapter_diff import diff as diff_

    found = diff_(_registry(home), a, b)
    sections = {"made of": found.made_of, "recipe": found.recipe, "metrics": found.metrics, "sizes": found.sizes}
    if as_json:
        listed = {
            name.replace(" ", "_"): [{"name": d.name, "a": _plain(d.a), "b": _plain(d.b), "change": d.change} for d in differences]
            for name, differences in sections.items()
        }
        output().print_json(json.dumps({"a": str(found.a.ref), "b": str(found.b.ref), **listed}))
        return
    for name, differences in sections.items():
        if differences:
            rows = [(d.name, _cell(d.a, name), _cell(d.b, name), _change(d.change, name)) for d in differences]
            output().print(table((name.upper(), str(found.a.ref), str(found.b.ref), "CHANGE"), rows))


def print_move(name: str, before: Any, after: Any) -> None:
    """`prod -> bot@3 90%, bot@4 10% (was bot@3)`, of an alias as it was, if it was there, and as it is."""
    now = after.current.says()
    if before and before.number == after.number:
        output().print(f"{name} -> {now}, as before; nothing was changed", markup=False)
        return
    was = f" (was {before.current.says()})" if before and before.current.says() != now else ""
    output().print(f"{name} -> {now}{was}", markup=False)
    for objection in after.current.forced:
        output().print(f"forced past the gate: {objection}", markup=False)


def _reason(state: Any) -> str:
    parts = [f"back to state {state.restores}"] if state.restores else []
    parts += [state.why] if state.why else []
    return "; ".join([*parts, *(f"forced: {objection}" for objection in state.forced)])


def _share(text: str, option: str) -> float:
    """`10%` or `0.1`."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0.0001 <= share <= 1:
        raise RegistryError(f"{option} {text}: give a share from 0.01% to 100%, such as 10%")
    return share


def _shadow(text: str) -> tuple[str, float] | None:
    if text == "none":
        return None
    version, _, share = text.partition(":")
    return version, _share(share or "100%", "--shadow")


def _policy(text: str) -> Any:
    from pydantic import ValidationError

    from hone.releases import RollbackPolicy

    if text == "none":
        return None
    rate, *rest = text.split(":")
    names = ("window_s", "min_requests")
    try:
        if len(rest) > len(names):
            raise ValueError
        return RollbackPolicy(error_rate=_share(rate, "--rollback-on"), **dict(zip(names, map(float, rest), strict=False)))
    except (ValueError, ValidationError):
        raise RegistryError(
            f"--rollback-on {text}: give RATE[:SECONDS[:REQUESTS]], such as 5% or 5%:60:20, with a rate below 100%"
        ) from None


def _cell(value: Any, section: str) -> str:
    if value is None:
        return ""
    if section == "sizes":
        return size(value)
    if section == "metrics":
        return str(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:16] if len(text) == 64 and text.isalnum() else text  # digests are told by their beginning


def _change(change: float | None, section: str) -> str:
    if not change:
        return "" if change is None else "0"
    sign = "+" if change > 0 else "-"
    return sign + (size(abs(change)) if section == "sizes" else number(float(abs(change))))


def _plain(value: Any) -> Any:
    from hone.release_gate import Figure

    return {"value": value.value, "low": value.low, "high": value.high} if isinstance(value, Figure) else value


def _registry(home: Any) -> Any:
    from hone.registry import Registry
    from hone.storage import Home

    return Registry(Home(home))
