"""`hone top`: how a running server is doing, from what it tells Prometheus."""

import json
import os
import time
from typing import Annotated

import typer

from cluster.terminal import output


def top(
    url: Annotated[str, typer.Argument(help="Address of the server.")] = "http://127.0.0.1:8000",
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one look as JSON, and end.")] = False,
    rows: Annotated[int, typer.Option(min=1, help="Adapters, and keys, that are shown: the busiest.")] = 12,
) -> None:
    """Requests, tokens, waiting times, adapters and keys of a running server, live; Ctrl-C ends it.

    Where the server takes API keys, HONE_API_KEY is to be one with the scope `metrics`.
    """
    from rich.live import Live

    from cluster.watch import compare, drawn, scrape

    key, url = os.environ.get("HONE_API_KEY"), url.rstrip("/").removesuffix("/v1")
    before = scrape(url, key=key)
    if once or as_json:
        time.sleep(interval)
        look = compare(before, scrape(url, key=key))
        console = output()
        console.print_json(json.dumps(look.as_json())) if as_json else console.print(drawn(look, url=url, rows=rows))
        return
    try:
        with Live(drawn(compare(before, before), url=url, rows=rows), console=output(), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                after = scrape(url, key=key)
                live.update(drawn(compare(before, after), url=url, rows=rows), refresh=True)
                before = after
    except KeyboardInterrupt:
        raise typer.Exit from None
