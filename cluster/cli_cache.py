"""`hone data cache`: what preparing data has left on disk, and how to be rid of it."""

import json
import math
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from cluster.cli_run import HomeOption
from cluster.terminal import ago, notes, output, size, table
from hone.errors import DataError

cache = typer.Typer(help="Prepared data on disk: list, clear.", no_args_is_help=True)
SHOWN_DIGEST = 12
DAY_S = 86_400
CLOCKS_S = 60
"""How far the clocks of two machines may be apart."""


@cache.command("list")
def list_(home: HomeOption = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tokens and splits, the last used first."""
    from hone.data.cache import entries
    from hone.storage import Home

    found = entries(Home(home))
    if as_json:
        typer.echo(json.dumps([{**asdict(entry), "folder": str(entry.folder)} for entry in found], indent=2))
        return
    if not found:
        output().print("nothing prepared yet")
        return
    rows = [
        (
            entry.digest[:SHOWN_DIGEST],
            entry.kind,
            f"{entry.rows:,}",
            size(entry.bytes),
            ago(datetime.fromtimestamp(entry.used_at, UTC)),
            entry.what,
        )
        for entry in found
    ]
    output().print(table(("DIGEST", "KIND", "ROWS", "SIZE", "USED", "DATA"), rows))
    output().print(f"\n{size(sum(entry.bytes for entry in found))} in all, under {Home(home).datasets}", markup=False)


@cache.command()
def clear(
    digests: Annotated[list[str] | None, typer.Argument(metavar="[DIGEST...]", help="Which; by default all.", show_default=False)] = None,
    unused_for: Annotated[float, typer.Option(metavar="DAYS", help="Only what no run has taken for so many days.")] = 0.0,
    home: HomeOption = None,
) -> None:
    """Remove prepared data; what a running job may read is kept. The next run that wants it prepares it anew."""
    from hone.data.cache import clear as clear_entries
    from hone.data.cache import entries
    from hone.storage import Home
    from hone.store import Store

    where = Home(home)
    found = entries(where)
    for digest in digests or []:
        if not any(entry.digest.startswith(digest) for entry in found):
            raise DataError(f"{digest}: nothing prepared has that digest; see `hone data cache list`")
    wanted = [entry for entry in found if not digests or entry.digest.startswith(tuple(digests))]
    if unused_for:
        wanted = [entry for entry in wanted if time.time() - entry.used_at >= unused_for * DAY_S]
    if not wanted:
        notes().print("nothing to remove")
        return
    store = Store(where.store_url)
    running = [job for job in store.jobs() if job.status not in ("succeeded", "failed", "stopped")]
    store.close()
    since = min((job.created_at.replace(tzinfo=UTC).timestamp() - CLOCKS_S for job in running), default=math.inf)
    removed, kept = clear_entries(wanted, in_use_since=since)
    output().print(f"removed {len(removed)}, {size(sum(entry.bytes for entry in removed))}")
    if kept:
        notes().print(f"kept {len(kept)} that running jobs may read: {', '.join(job.id for job in running)}", markup=False)
