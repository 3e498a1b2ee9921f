"""`hone demo`: the main job end to end on this machine: train, search, publish, serve, ask.

One local Ray is shared by all steps. Each step is the very command a user would type, in a child process.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.child import run_child
from cluster.cli_serve import print_how_to_ask
from cluster.connect import LocalRay, local_ray
from cluster.deploy import check_bind, deploy_locally, url_of
from cluster.entrypoint import MODULE, training_argv
from hone.base_model import find_base_model
from hone.errors import ResourceError
from hone.ids import new_run_id
from hone.registry import Registry
from hone.storage import Home, write_text

NAME = "demo"
HOST = "127.0.0.1"
ANSWER_TOKENS = 48
SEED = 0


class StepFailedError(Exception):
    """A step's process has said what was wrong and ended with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_demo(home: Home, *, base: str | None, port: int, keep: bool, console: Console) -> int:
    """The whole way; 0, or the exit code of the step that failed.

    Args:
        home: Everything is made below it.
        base: Base model; without one, a tiny one is made.
        port: Port of the endpoint on 127.0.0.1.
        keep: Leave the endpoint running.
        console: Where to show it.

    Raises:
        HoneError: something is missing before it can begin, or serving fails.
    """
    if importlib.util.find_spec("openai") is None:
        raise ResourceError("the demo asks its questions with the openai client, which is not installed; pip install 'hone[demo]'")
    check_bind(HOST, port)
    home.ready()
    if base is not None:
        find_base_model(base, home=home)
    try:
        _Demo(home, base=base, port=port, console=console).run(keep=keep)
    except StepFailedError as error:
        return error.code
    except KeyboardInterrupt:
        console.print("\nhone: stopped; nothing is left running. `hone demo` starts again and reuses the sample data", markup=False)
        return 130
    return 0


class _Demo:
    def __init__(self, home: Home, *, base: str | None, port: int, console: Console) -> None:
        self._home = home
        self._folder = home.root / NAME
        self._base = _absolute(base) if base else str(self._folder / "base")
        self._is_own_base = base is None
        self._port = port
        self._console = console
        self._began = time.monotonic()
        self._runs: list[str] = []

    def run(self, *, keep: bool) -> None:
        with self._step("sample data" + (" and a tiny base model" if self._is_own_base else "")):
            self._make_sample()
            recipe = self._write_recipe()
        with ExitStack() as stack:
            with self._step("local Ray"):
                ray = stack.enter_context(local_ray())
            with self._step("train, and compare with the base"):
                self._train(ray, recipe, is_search=False)
            with self._step("search three trials, publish the best"):
                self._train(ray, recipe, is_search=True)
            with self._step("serve the base and both adapters"):
                models = deploy_locally(ray, base=self._base, home=str(self._home.root), host=HOST, port=self._port)
            with self._step("ask base and adapter the same three questions"):
                self._ask(models)
            self._say_what_was_made(recipe)
            if keep:
                ray.keep()
                print_how_to_ask(url_of(HOST, self._port), models, console=self._console)
                self._console.print(f"The endpoint stays. To end it and its Ray: kill {ray.pid}")

    def _make_sample(self) -> None:
        base = [] if self._is_own_base else ["--base", self._base]
        self._child([sys.executable, "-P", "-m", f"{MODULE}.sample", "--out", str(self._folder), *base], {})

    def _write_recipe(self) -> Path:
        path = self._folder / "recipe.yaml"
        write_text(path, "# Written by `hone demo`.\n" + yaml.safe_dump(_recipe(self._base), sort_keys=False))
        return path

    def _train(self, ray: LocalRay, recipe: Path, *, is_search: bool) -> None:
        run_id = new_run_id(NAME)
        self._child(training_argv(recipe, is_search=is_search, home=self._home.root, run_id=run_id), ray.environment)
        self._runs.append(run_id)

    def _child(self, argv: list[str], environment: dict[str, str]) -> None:
        code = run_child(argv, environment=environment)
        if code in (130, 143):
            raise KeyboardInterrupt
        if code:
            raise StepFailedError(code)

    def _ask(self, models: Iterable[str]) -> None:
        """The same questions to base and best adapter, side by side with the answer that the documentation gives."""
        from openai import OpenAI

        best = str(Registry(self._home).resolve(NAME).ref)
        base = next(name for name in models if not name.startswith(f"{NAME}@") and name != NAME)
        client = OpenAI(base_url=f"{url_of(HOST, self._port)}/v1", api_key="none", max_retries=0)
        shown = Table("question", "base", best, "reference", show_lines=True, expand=True)
        for row in _questions(self._folder / "questions.jsonl"):
            asked = [message for message in row["messages"] if message["role"] != "assistant"]
            answers = [_answer(client, name, asked) for name in (base, best)]
            shown.add_row(*(escape(text) for text in (asked[-1]["content"], *answers, row["messages"][-1]["content"])))
        self._console.print(shown)

    def _say_what_was_made(self, recipe: Path) -> None:
        registry = Registry(self._home)
        option = "" if self._home.root == Home().root else f" --home {self._home.root}"
        best = registry.resolve(NAME)
        lines = [
            "",
            f"Done in {self._elapsed()}. Made:",
            f"  runs      {', '.join(str(self._home.runs / run) for run in self._runs)}",
            f"  adapters  {', '.join(str(m.ref) for m in registry.adapters() if m.name == NAME)}",
            f"  card      {registry.path(best.ref) / 'README.md'}",
            f"  recipe    {recipe}",
            "Next:",
            f"  hone adapters show {best.ref}{option}",
            f"  hone adapters alias prod {best.ref}{option}",
            f"  hone train {recipe} method.r=16{option}",
            f"  hone serve --base {self._base}{option}",
            "  hone recipe init    # a recipe of your own",
        ]
        self._console.print("\n".join(lines), markup=False)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self._console.rule(f"[bold]{name}[/]  [dim]{self._elapsed()}[/]", align="left")
        yield

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes}:{seconds:02d}"


def _recipe(base: str) -> dict[str, Any]:
    return {
        "name": NAME,
        "task": "chat",
        "base": base,
        "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 256},
        "method": {"type": "lora", "r": 8, "lora_alpha": 16},
        "optim": {"learning_rate": 3e-3},
        "train": {"max_steps": 80, "global_batch_size": 16, "micro_batch_size": 8, "eval_steps": 20, "seed": SEED},
        "zero": {"stage": 2},
        "scaling": {"num_workers": 2},
        "search": {
            "num_samples": 3,
            "space": {
                "optim.learning_rate": {"type": "loguniform", "lower": 2e-3, "upper": 2e-2},
                "method.r": {"type": "choice", "categories": [8, 16, 32]},
            },
        },
    }


def _questions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _answer(client: Any, model: str, messages: list[dict[str, str]]) -> str:
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=ANSWER_TOKENS, temperature=0)
    return str(answer.choices[0].message.content).strip()


def _absolute(base: str) -> str:
    folder = Path(base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else base
