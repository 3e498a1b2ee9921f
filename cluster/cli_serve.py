"""`hone serve`: a base model and every adapter of it, over HTTP on this machine or on a cluster."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.cli_run import HomeOption
from cluster.terminal import notes, output
from hone.errors import RunFailedError
from hone.storage import Home
from hone.tasks import TASKS, TaskName, curl

if TYPE_CHECKING:
    from cluster.deploy import Auth, Replicas


def serve(
    base: Annotated[
        str, typer.Option(help="Base model: a folder, a hub name, or a published whole model NAME@VERSION.", show_default=False)
    ],
    home: HomeOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to answer on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to answer on; one that others can reach takes API keys (`hone keys`).")] = "127.0.0.1",
    address: Annotated[
        str | None, typer.Option(help="Dashboard URL of a Ray cluster to deploy to, instead of this machine.", show_default=False)
    ] = None,
    replicas: Annotated[
        str, typer.Option(help="How many replicas of the base; or FEWEST:MOST, as many as the requests take, such as 0:4.")
    ] = "1",
    allow_anonymous: Annotated[bool, typer.Option("--allow-anonymous", help="Answer everyone who can reach it, without a key.")] = False,
) -> None:
    """Answer OpenAI-style requests for a base model and its published adapters.

    Once there are API keys (`hone keys create`), each request needs one; before that, those of this machine need none.
    """
    from cluster.deploy import access_at, check_bind, parse_replicas

    count = parse_replicas(replicas)
    if address is not None:
        _serve_on_cluster(base, home, address, auth="off" if allow_anonymous else "auto", replicas=count)
        return
    opened = Home(home)
    auth = access_at(host, opened, allow_anonymous=allow_anonymous)
    check_bind(host, port)
    _serve_here(base, opened, host, port, auth, count)


def _serve_here(base: str, home: Home, host: str, port: int, auth: "Auth", replicas: "Replicas") -> None:
    from cluster.connect import local_ray
    from cluster.deploy import deploy_locally, url_of
    from hone.base_model import find_base_model

    home.ready()
    find_base_model(base, home=home)
    folder = str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base
    console = notes()
    try:
        with console.status("starting a local Ray") as status, local_ray() as ray:
            status.update(f"loading {base}")
            models = deploy_locally(ray, base=folder, home=str(home.root), host=host, port=port, auth=auth, replicas=replicas)
            status.stop()
            print_how_to_ask(url_of(host, port), models, console=output())
            console.print("Ctrl-C ends it.")
            while ray.process.poll() is None:
                time.sleep(0.5)
            raise RunFailedError(f"the local Ray ended by itself with code {ray.process.returncode}; start it again")
    except KeyboardInterrupt:
        console.print("hone: ended; nothing is left running. The same command starts it again", markup=False)
        raise typer.Exit(130) from None


def _serve_on_cluster(base: str, home: str | None, address: str, *, auth: "Auth", replicas: "Replicas") -> None:
    """Deploy and return. The home is the one that was given, else ours if the cluster is this machine, else the cluster's own."""
    from cluster.dashboard import Dashboard
    from cluster.deploy import deploy, wait_until_deployed

    dashboard = Dashboard(address)
    dashboard.get("/api/version")
    is_here = dashboard.is_on_this_machine()
    folder = Path(base).expanduser()
    deploy(
        dashboard,
        base=str(folder.resolve()) if is_here and folder.is_dir() else base,
        home=str(Home(home).root) if is_here else home,
        auth=auth,
        replicas=replicas,
    )
    with notes().status(f"{dashboard.address} is loading {base}"):
        wait_until_deployed(dashboard)
    output().print(
        f"serving {base} on the cluster at {dashboard.address}, at the port of its Serve proxies (8000 by default)", markup=False
    )


def print_how_to_ask(url: str, models: Mapping[str, TaskName], *, console: Console) -> None:
    """The URL, what answers there, and how to ask the last of it."""
    if not models:
        console.print(f"\n{url}/v1 answers to API keys; GET /v1/models lists what a key may call\n", markup=False)
        return
    name, task = list(models.items())[-1]
    console.print(f"\n{url}/v1 answers for: {', '.join(models)}\n", markup=False)
    console.print(f"  {curl(task, name, url=url)}\n", markup=False)
    if TASKS[task].route != TASKS["chat"].route:
        return
    console.print(
        "  from openai import OpenAI\n"
        f'  client = OpenAI(base_url="{url}/v1", api_key="none")\n'
        f'  answer = client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "Hello"}}])\n'
        "  print(answer.choices[0].message.content)\n",
        markup=False,
    )
