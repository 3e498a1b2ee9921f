"""`hone serve`: a base model and every adapter of it, over HTTP on this machine or on a cluster."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.cli_run import HomeOption
from cluster.terminal import notes, output
from hone.errors import RecipeError, ResourceError, RunFailedError
from hone.recipe.serving import EngineName
from hone.storage import Home
from hone.tasks import TASKS, TaskName, curl

if TYPE_CHECKING:
    from cluster.deploy import Auth, Replicas
    from hone.recipe import ServingSettings


def serve(
    base: Annotated[
        str | None, typer.Option(help="Base model: a folder, a hub name, or a published whole model NAME@VERSION.", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe whose base is served, as its serving: section says.", show_default=False)
    ] = None,
    engine: Annotated[
        EngineName | None,
        typer.Option(help="What makes the answers: hone's own slot engine, or vLLM (pip install 'hone\\[vllm]').", show_default="slots"),
    ] = None,
    home: HomeOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to answer on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to answer on; one that others can reach takes API keys (`hone keys`).")] = "127.0.0.1",
    address: Annotated[
        str | None, typer.Option(help="Dashboard URL of a Ray cluster to deploy to, instead of this machine.", show_default=False)
    ] = None,
    replicas: Annotated[
        str, typer.Option(help="How many replicas of the base; or FEWEST:MOST, as many as the requests take, such as 0:4.")
    ] = "1",
    adapter_disk: Annotated[
        Path | None,
        typer.Option(help="Folder on each replica's own disk for adapters, where the registry is on another machine.", show_default=False),
    ] = None,
    allow_anonymous: Annotated[bool, typer.Option("--allow-anonymous", help="Answer everyone who can reach it, without a key.")] = False,
) -> None:
    """Answer OpenAI-style requests for a base model and its published adapters.

    Once there are API keys (`hone keys create`), each request needs one; before that, those of this machine need none.
    """
    from cluster.deploy import access_at, check_bind, parse_replicas

    count = parse_replicas(replicas)
    if address is not None and adapter_disk is not None and not adapter_disk.is_absolute():
        raise RecipeError(f"--adapter-disk {adapter_disk}: with --address it is on the cluster's machines, so name it by its whole path")
    base, serving = _what(base, recipe, engine, adapter_disk)
    if address is not None:
        _serve_on_cluster(base, home, address, auth="off" if allow_anonymous else "auto", replicas=count, serving=serving)
        return
    _check_engine_here(serving)
    opened = Home(home)
    auth = access_at(host, opened, allow_anonymous=allow_anonymous)
    check_bind(host, port)
    _serve_here(base, opened, host, port, auth, count, serving)


def _what(
    base: str | None, recipe: Path | None, engine: EngineName | None, adapter_disk: Path | None = None
) -> tuple[str, "ServingSettings"]:
    """The base and how it is served: what was said, and otherwise what the recipe says.

    Raises:
        RecipeError: there is no base, or the recipe is not one.
    """
    from hone.recipe import ServingSettings, load_recipe

    found = load_recipe(recipe) if recipe else None
    named = base or (found.base if found else None)
    if named is None:
        raise RecipeError("name what to serve: --base MODEL, or --recipe FILE for the base of a recipe")
    serving = found.serving if found else ServingSettings()
    said = {"engine": engine, "adapter_disk": adapter_disk and str(adapter_disk.expanduser().absolute())}
    return named, serving.model_copy(update={key: value for key, value in said.items() if value})


def _check_engine_here(serving: "ServingSettings") -> None:
    """Refuse vLLM before anything is started where it cannot run on this machine.

    Raises:
        ResourceError: its package is not installed, or there are too few GPUs.
    """
    from hone.engines import check_engine

    check_engine(serving.engine)
    if serving.engine != "vllm":
        return
    import torch

    there, wanted = torch.cuda.device_count(), serving.vllm.tensor_parallel_size
    if there < wanted:
        raise ResourceError(
            f"engine vllm: it takes {wanted} GPU(s) and this machine has {there}; take --engine slots, or --address a cluster"
        )


def _serve_here(base: str, home: Home, host: str, port: int, auth: "Auth", replicas: "Replicas", serving: "ServingSettings") -> None:
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
            models = deploy_locally(
                ray, base=folder, home=str(home.root), host=host, port=port, auth=auth, replicas=replicas, serving=serving
            )
            status.stop()
            print_how_to_ask(url_of(host, port), models, console=output())
            console.print("Ctrl-C ends it.")
            while ray.process.poll() is None:
                time.sleep(0.5)
            raise RunFailedError(f"the local Ray ended by itself with code {ray.process.returncode}; start it again")
    except KeyboardInterrupt:
        console.print("hone: ended; nothing is left running. The same command starts it again", markup=False)
        raise typer.Exit(130) from None


def _serve_on_cluster(base: str, home: str | None, address: str, *, auth: "Auth", replicas: "Replicas", serving: "ServingSettings") -> None:
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
        serving=serving,
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
