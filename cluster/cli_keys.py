"""`hone keys`: API keys, and `hone usage`: what was used with them."""

import json
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from cluster.cli_run import HomeOption
from cluster.moments import moment, written
from cluster.terminal import notes, output, table

keys = typer.Typer(help="API keys of a server: create, list, revoke.", no_args_is_help=True)

By = Literal["key", "adapter"]
BOTH: tuple[By, ...] = ("key", "adapter")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for, such as support-bot.", show_default=False)],
    project: Annotated[str, typer.Option(help="Projects share the engine fairly, whatever number of keys each has.")] = "default",
    scope: Annotated[list[str] | None, typer.Option(help="inference (the default), metrics or admin; may be repeated.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Pattern of adapters, aliases or bases that it may call, such as 'support-*'; may be repeated.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests that it may send a minute.", show_default=False)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens a minute, of prompts and answers.", show_default=False)] = None,
    expires: Annotated[
        str | None, typer.Option(help="When it ends: 30d, 12h, or a date such as 2027-01-31 (UTC).", show_default=False)
    ] = None,
    weight: Annotated[float, typer.Option(help="Share of its project's turns beside other projects.")] = 1.0,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, and print it. It is shown this once: the store keeps a digest of it."""
    made, token = _keys(home).create(
        name,
        project=project,
        scopes=scope or ["inference"],
        adapters=adapter or ["*"],
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        expires_at=None if expires is None else moment(expires, ahead=True),
        weight=weight,
    )
    if as_json:
        output().print_json(json.dumps({**_described(made), "key": token}))
        return
    output().print(token, markup=False)
    notes().print(f"{made.id} ({made.label}); this is the only time that the key is shown", markup=False)


@keys.command("list")
def list_(home: HomeOption = None, as_json: AsJson = False) -> None:
    """Every key, newest first; what is shown of it is its beginning."""
    found = _keys(home).all()
    if as_json:
        output().print_json(json.dumps([_described(key) for key in found]))
        return
    if not found:
        output().print("no keys yet; `hone keys create NAME` makes one", markup=False)
        return
    rows = [
        (
            key.id,
            key.label,
            f"{key.prefix}...",
            key.state,
            ", ".join(key.scopes),
            ", ".join(key.adapters),
            _limits(key),
            f"{key.weight:g}",
            written(key.created_at),
            written(key.expires_at),
        )
        for key in found
    ]
    output().print(table(("ID", "PROJECT/NAME", "KEY", "STATE", "SCOPES", "ADAPTERS", "A MINUTE", "WEIGHT", "MADE", "EXPIRES"), rows))


@keys.command()
def revoke(
    key: Annotated[str, typer.Argument(help="Its id, its visible beginning, PROJECT/NAME, or NAME.", show_default=False)],
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """End a key. Servers that reach the store refuse it within seconds."""
    revoked = _keys(home).revoke(key)
    if as_json:
        output().print_json(json.dumps(_described(revoked)))
        return
    output().print(f"{revoked.id} ({revoked.label}): revoked; servers refuse it within 5 s", markup=False)


def usage(
    since: Annotated[str, typer.Option(help="From when on: 24h, 30d, or a date such as 2027-01-31 (UTC); whole hours.")] = "30d",
    by: Annotated[By | None, typer.Option(help="What to sum by; by default both together.", show_default=False)] = None,
    home: HomeOption = None,
    as_json: AsJson = False,
) -> None:
    """Requests and tokens by key and adapter."""
    from hone.storage import Home
    from hone.usage import Usage, total

    columns = (by,) if by else BOTH
    sums = Usage(Home(home).store_url).by(*columns, since=moment(since, ahead=False))
    labels = {key.id: key.label for key in _keys(home).all()}
    if as_json:
        listed = [{**dict(zip(columns, names, strict=True)), **_labelled(columns, names, labels), **asdict(u)} for names, u in sums.items()]
        output().print_json(json.dumps(listed))
        return
    if not sums:
        output().print("nothing was used in that time", markup=False)
        return
    rows = [((*(labels.get(name, name) for name in names),), used) for names, used in sums.items()]
    rows.append((("total", *[""] * (len(columns) - 1)), total(sums.values())))
    head = (*(column.upper() for column in columns), "REQUESTS", "PROMPT TOKENS", "OF THEM KEPT", "ANSWER TOKENS")
    output().print(table(head, [(*names, *(f"{count:,}" for count in vars(used).values())) for names, used in rows]))


def _keys(home: str | None) -> Any:
    from hone.keys import Keys
    from hone.storage import Home

    return Keys(Home(home).store_url)


def _described(key: Any) -> dict[str, Any]:
    """Everything but the digest, which is of use to nobody."""
    return {name: value for name, value in asdict(key).items() if name != "digest"} | {"state": key.state}


def _labelled(columns: tuple[By, ...], names: tuple[str, ...], labels: dict[str, str]) -> dict[str, str]:
    return {"key_name": labels.get(names[columns.index("key")], "")} if "key" in columns else {}


def _limits(key: Any) -> str:
    limits = ((key.requests_per_minute, "requests"), (key.tokens_per_minute, "tokens"))
    return ", ".join(f"{limit:,} {what}" for limit, what in limits if limit is not None)
