"""Adapters of the tiny Llama and the tiny BERT, different in rank, targets and labels, published once."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from hone.base_model import find_base_model
from hone.manifest import AdapterManifest
from hone.registry import Registry
from hone.storage import Home
from serving.base import Engine, Served, load_engine
from serving.loading import AdapterLoader
from tests.serving_fixtures import publish, reload_peft
from tests.unit.serving.rooms import CASES, WHOLE, Room, answering

CHAT: dict[str, dict[str, Any]] = {
    "narrow": {"seed": 1, "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"seed": 2, "r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    "mixed": {"seed": 3, "r": 4, "target_modules": ["o_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"o_proj": 6}},
    "patterned": {"seed": 4, "r": 3, "target_modules": ["k_proj", "up_proj"], "alpha_pattern": {"layers.1.mlp.up_proj": 20}},
}
LABELS = {"tone": ["angry", "calm"], "topic": ["art", "news", "sport", "trade", "war"]}


@dataclass(frozen=True)
class Shelf:
    """A home with published adapters of one base, and each of them as PEFT loads it."""

    home: Home
    base: Path
    manifests: dict[str, AdapterManifest]
    peft: dict[str, PeftModel]

    @property
    def registry(self) -> Registry:
        return Registry(self.home)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing their work among threads, the more so beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chat_shelf(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    home = Home(tmp_path_factory.mktemp("chat-home"))
    manifests = {name: publish(home, llama, name, **settings) for name, settings in CHAT.items()}
    return Shelf(home, llama, manifests, {name: reload_peft(home, llama, manifest) for name, manifest in manifests.items()})


@pytest.fixture(scope="session")
def label_shelf(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    home = Home(tmp_path_factory.mktemp("label-home"))
    manifests = {
        name: publish(home, bert, name, seed=n, labels=labels, r=4, target_modules=["query", "value"] if n else "all-linear")
        for n, (name, labels) in enumerate(LABELS.items())
    }
    peft = {name: reload_peft(home, bert, manifest, labels=LABELS[name]) for name, manifest in manifests.items()}
    return Shelf(home, bert, manifests, peft)


def start(shelf: Shelf, *, max_rows: int = 8) -> Engine:
    base = find_base_model(str(shelf.base), home=shelf.home)
    return load_engine(base, max_rows=max_rows, max_context=None)


@pytest.fixture(scope="session")
def engine(chat_shelf: Shelf) -> Iterator[Engine]:
    engine = start(chat_shelf)
    yield engine
    engine.thread.stop()


@pytest.fixture(scope="session")
def loader(chat_shelf: Shelf, engine: Engine) -> AdapterLoader:
    return AdapterLoader(chat_shelf.registry, engine)


@pytest.fixture(scope="session")
def everyone(engine: Engine, loader: AdapterLoader, chat_shelf: Shelf) -> dict[str, Served]:
    return {"base": engine.base, **{name: loader.load(manifest) for name, manifest in chat_shelf.manifests.items()}}


@pytest.fixture(scope="session")
def encoder(label_shelf: Shelf) -> Iterator[Engine]:
    engine = start(label_shelf)
    yield engine
    engine.thread.stop()


@pytest.fixture(scope="session")
def rooms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Room]]:
    """One server for each base, of everything that is published for it."""
    made = {}
    with ExitStack() as closing:
        for base in ("llama", "bert", "bart", "vit", "ast"):
            folder = request.getfixturevalue(base)
            home = Home(tmp_path_factory.mktemp(f"{base}-home"))
            published = {case.name: case.publish(home, folder) for case in CASES.values() if case.base == base and case.method not in WHOLE}
            made[base] = Room(home, folder, closing.enter_context(answering(home, str(folder))), published)
        yield made


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
