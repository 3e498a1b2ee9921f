"""Rows of adapters with different heads in one batch, against PEFT one adapter at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hone.storage import Home
from serving.base import Engine, Served
from serving.calls import Scores
from serving.errors import AdapterRefusedError, EngineError
from serving.loading import AdapterLoader
from serving.reading import Reader, answer
from tests.serving_fixtures import edit_config, publish, reload_peft
from tests.unit.serving.conftest import LABELS, Shelf, start

TEXTS = ("the cat sat on a mat", "why", "seven small birds sang over green hills near an old stone house", "thank you")


def classify(engine: Engine, work: list[tuple[Served, str]]) -> list[list[float]]:
    reader = Reader(engine.vocabulary)
    questions = [reader.questions(served, [text])[0] for served, text in work]
    engine.thread.call(lambda: engine.classification.add([question.asked for question in questions])).result()
    found = []
    for (served, _), question in zip(work, questions, strict=True):
        scores = answer(served, question, question.asked.result.result(timeout=20))
        assert isinstance(scores, Scores)
        found.append(scores.probabilities)
    return found


def alone(model: Any, tokenizer: Any, text: str) -> list[float]:
    with torch.no_grad():
        probabilities: list[float] = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    return probabilities


def test_each_row_gets_its_own_adapters_head(label_shelf: Shelf, encoder: Engine) -> None:
    loader = AdapterLoader(label_shelf.registry, encoder)
    served = {name: loader.load(manifest) for name, manifest in label_shelf.manifests.items()}
    work = [(name, text) for text in TEXTS for name in LABELS]
    answers = classify(encoder, [(served[name], text) for name, text in work])
    for (name, text), got in zip(work, answers, strict=True):
        assert len(got) == len(LABELS[name])
        assert got == pytest.approx(alone(label_shelf.peft[name], served[name].processor, text), abs=1e-5)


def test_an_encoder_without_a_trained_head_has_no_labels(encoder: Engine) -> None:
    assert encoder.base.labels == ()
    assert encoder.generation is None


def test_a_causal_base_that_chats_classifies_too(llama: Path, home: Home) -> None:
    labels = ["no", "perhaps", "yes"]
    manifests = [
        publish(home, llama, name, seed=n, labels=labels[: n + 2], r=3, target_modules="all-linear") for n, name in enumerate("ab")
    ]
    shelf = Shelf(home, llama, {}, {})
    engine = start(shelf)
    try:
        loader = AdapterLoader(shelf.registry, engine)
        served = [loader.load(manifest) for manifest in manifests]
        work = [(n, text) for text in TEXTS for n in (0, 1)]
        answers = classify(engine, [(served[n], text) for n, text in work])
        for (n, text), got in zip(work, answers, strict=True):
            model = reload_peft(home, llama, manifests[n], labels=labels[: n + 2])
            assert got == pytest.approx(alone(model, served[n].processor, text), abs=1e-5)
    finally:
        engine.thread.stop()


def test_a_head_that_is_not_there_or_not_the_bases_is_refused(label_shelf: Shelf, encoder: Engine, home: Home) -> None:
    settings: dict[str, Any] = {"seed": 1, "labels": ["a", "b"], "r": 2, "target_modules": ["query"]}
    loader = AdapterLoader(type(label_shelf.registry)(home), encoder)
    unnamed = publish(home, label_shelf.base, "odd", **settings, edit=lambda folder: edit_config(folder, modules_to_save=["pooler"]))
    with pytest.raises(AdapterRefusedError, match="neither a LoRA matrix nor part of a module"):
        loader.load(unnamed)
    more = publish(home, label_shelf.base, "odd", **settings).model_copy(update={"labels": ["a", "b", "c"]})
    with pytest.raises(AdapterRefusedError, match="2 outputs, 3 labels"):
        loader.load(more)


def test_texts_that_wait_are_told_when_the_thread_ends(label_shelf: Shelf) -> None:
    engine = start(label_shelf)
    served = AdapterLoader(label_shelf.registry, engine).load(label_shelf.manifests["tone"])
    engine.thread.stop()
    with pytest.raises(EngineError, match="stopping"):
        classify(engine, [(served, "too late")])
