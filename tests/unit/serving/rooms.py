"""Every task by every method on a tiny base, published and served: what the tests of the routes and of the copies ask."""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from starlette.testclient import TestClient

from hone.manifest import AdapterManifest
from hone.methods import METHODS as METHOD_FACTS
from hone.methods import MethodName, why_not
from hone.registry import Registry
from hone.storage import Home
from hone.tasks import TASKS as FACTS
from hone.tasks import TaskName
from models.tasks import TASKS, Head
from serving.ingress import make_app
from serving.replica import Replica
from tests.serving_fixtures import batch_of, load_plainly, publish_trained

LABELS = ["art", "news", "sport"]
NONE = Head()
SINGLE = Head(LABELS, "single_label_classification")
HEADS = [SINGLE, Head(LABELS, "multi_label_classification"), Head(None, "regression")]
TEXTS = ["the cat sat on a mat", "why does it rain", "thank you"]
USER = [{"role": "user", "content": "why does it rain?"}]
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "adapter": {"bottleneck_size": 4},
    "prompt": {"num_virtual_tokens": 5},
    "prefix": {"num_virtual_tokens": 5},
}
WHOLE: set[MethodName] = {"full", "freeze"}


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def sound(seed: int) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.random.default_rng(seed).normal(0, 0.1, 4000 + 900 * seed), 16000, format="WAV")
    return stream.getvalue()


def rows_of(task: TaskName) -> list[Any]:
    """Three rows as training reads them."""
    match FACTS[task].shape:
        case "chat":
            return [{"messages": [*USER, {"role": "assistant", "content": text}]} for text in TEXTS]
        case "text":
            return [{"text": text} for text in TEXTS]
        case "preference":
            return [{"prompt": USER, **{s: [{"role": "assistant", "content": s + t}] for s in ("chosen", "rejected")}} for t in TEXTS]
        case "labelled-text":
            return [{"text": text, "labels": []} for text in TEXTS]
        case "token-labels":
            return [{"tokens": text.split(), "labels": ["art"] * len(text.split())} for text in TEXTS]
        case "pair":
            return [{"source": text, "target": text[::-1]} for text in TEXTS]
        case "image":
            return [{"image": picture(seed), "labels": []} for seed in range(3)]
    return [{"audio": sound(seed), "labels": []} for seed in range(3)]


@dataclass(frozen=True)
class Case:
    base: str
    task: TaskName
    method: MethodName
    head: Head = NONE
    dora: bool = False

    @property
    def name(self) -> str:
        kind = (self.head.problem_type or "").partition("_")[0]
        return "-".join(filter(None, [self.base, self.task, self.method, kind, "dora" if self.dora else ""]))

    def publish(self, home: Home, base: Path) -> AdapterManifest:
        settings = SETTINGS.get(self.method, {}) | ({"use_dora": True} if self.dora else {})
        return publish_trained(
            home,
            base,
            self.name,
            task=self.task,
            method=self.method,
            rows=rows_of(self.task),
            head=self.head,
            seed=len(self.name),
            **settings,
        )


def cases() -> list[Case]:
    found = [
        Case("llama", "chat", "lora", dora=True),
        Case("bart", "seq2seq", "lora", dora=True),
        Case("llama", "token-classification", "lora", Head(LABELS)),
    ]
    tasks: list[tuple[str, TaskName, list[Head]]] = [
        ("llama", "chat", [NONE]),
        ("llama", "completion", [NONE]),
        ("llama", "preference", [NONE]),
        ("llama", "text-classification", [SINGLE]),
        ("bert", "text-classification", HEADS),
        ("bert", "token-classification", [Head(LABELS)]),
        ("bart", "seq2seq", [NONE]),
        ("vit", "image-classification", HEADS),
        ("ast", "audio-classification", HEADS),
    ]
    for base, task, heads in tasks:
        for method in METHOD_FACTS:
            found += [Case(base, task, method, head) for head in heads if why_not(task, method) is None]
    return [case for case in found if (case.base, case.task, case.method) != ("llama", "text-classification", "prompt")]  # it is refused


CASES = {case.name: case for case in cases()}


@dataclass(frozen=True)
class Room:
    """A base with its adapters, behind HTTP."""

    home: Home
    base: Path
    client: TestClient
    manifests: dict[str, AdapterManifest]

    def plain(self, name: str) -> Any:
        return load_plainly(self.home, self.base, self.manifests[name])

    def post(self, route: str, **body: Any) -> Any:
        response = self.client.post(route, json=body)
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def answering(home: Home, base: str, **settings: Any) -> Iterator[TestClient]:
    replica = Replica(base=base, home=str(home.root), max_rows=8, **settings)
    try:
        # Entered, so that all requests share one event loop, as behind a server.
        with TestClient(make_app(replica, Registry(home))) as client:
            yield client
    finally:
        replica.stop()


def asked(task: TaskName) -> list[Any]:
    """What a request gives: words are sent as a text."""
    return [{"text": text} for text in TEXTS] if task == "token-classification" else rows_of(task)


def sent(task: TaskName, row: Any) -> Any:
    """What a row is sent as."""
    if "text" in row:
        return row["text"]
    kind = FACTS[task].shape
    return {kind: base64.b64encode(row[kind]).decode()}


@torch.no_grad()
def expected_scores(model: Any, manifest: AdapterManifest, row: Any, processor: Any) -> Any:
    logits = TASKS[manifest.task].outputs(model, batch_of(manifest.task, [row], processor))[0]
    if manifest.problem_type == "regression":
        return logits.item()
    shares = logits.sigmoid() if manifest.problem_type == "multi_label_classification" else logits.softmax(-1)
    return dict(zip(LABELS, shares.tolist(), strict=True))
