"""`hone`: the one console command.

Commands are thin: they read their arguments, call what does the work, and print. Whatever is heavy is imported inside them, so that
`hone --help` answers at once. A HoneError is printed as it is; there are no tracebacks for mistakes a user can make.
"""

import os
import signal
import sys
from typing import Annotated

import typer

import hone
from cluster.cli_adapters import adapters
from cluster.cli_data import data
from cluster.cli_evaluate import evaluate, export
from cluster.cli_jobs import jobs, submit
from cluster.cli_keys import keys, usage
from cluster.cli_methods import methods
from cluster.cli_plan import plan
from cluster.cli_recipe import recipe
from cluster.cli_run import HomeOption, train, tune
from cluster.cli_runs import runs
from cluster.cli_serve import serve
from cluster.cli_top import top
from cluster.terminal import notes, output
from hone.errors import HoneError

app = typer.Typer(name="hone", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command(context_settings={"allow_interspersed_args": True})(train)
app.command()(tune)
app.command()(submit)
app.command(context_settings={"allow_interspersed_args": True})(plan)
app.command()(evaluate)
app.command()(export)
app.command()(methods)
app.add_typer(jobs, name="jobs")
app.add_typer(runs, name="runs")
app.add_typer(adapters, name="adapters")
app.add_typer(data, name="data")
app.add_typer(recipe, name="recipe")
app.command()(serve)
app.add_typer(keys, name="keys")
app.command()(usage)
app.command()(top)


def main() -> None:
    """Run the command line, and exit with its code."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
    try:
        app()
    except HoneError as error:
        sys.stderr.write(f"hone: {error.message}\n")
        sys.exit(1)
    except BrokenPipeError:  # `hone adapters list | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _hone(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Fine-tune pretrained models on a Ray cluster and serve what comes out."""
    if version:
        output().print(hone.__version__)
        raise typer.Exit


@app.command()
def demo(
    base: Annotated[str | None, typer.Option(help="Base model folder or hub name; by default a tiny one is made.")] = None,
    home: HomeOption = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the endpoint running.")] = False,
    port: Annotated[int, typer.Option(help="Port of the endpoint on 127.0.0.1.")] = 8000,
) -> None:
    """The whole way on this machine: train, search, publish, serve, ask."""
    from cluster.demo import run_demo
    from hone.storage import Home

    code = run_demo(Home(home), base=base, port=port, keep=keep, console=output())
    raise typer.Exit(code)


@app.command()
def doctor(
    home: HomeOption = None,
    address: Annotated[str | None, typer.Option(help="Dashboard URL of a Ray cluster to look at too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What this machine or cluster can run, and what to do about what it cannot."""
    from cluster.doctor import examine, print_findings
    from hone.storage import Home

    findings = examine(Home(home), address=address)
    print_findings(findings, as_json=as_json, console=output())
    raise typer.Exit(1 if any(finding.level == "fail" for finding in findings) else 0)


def _end(number: int, _frame: object) -> None:
    """SIGTERM and a closed terminal: leave through every `finally`, so that whatever was started is ended."""
    notes().print("hone: asked to end; cleaning up")
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
