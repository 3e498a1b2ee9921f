"""Every task, trained by every method that goes with it, answers over HTTP as the plain loaded model does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.chat import encode_prompt, end_of_turn_ids
from hone.storage import Home
from hone.tasks import TaskName
from models.tasks import TASKS
from models.tasks.token_classification import word_tokens
from serving.engine.text import TextStream
from tests.serving_fixtures import greedy_alone
from tests.unit.serving.rooms import CASES, LABELS, TEXTS, USER, WHOLE, Room, answering, expected_scores, rows_of, sent

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's generate, of itself


@pytest.fixture
def room(request: pytest.FixtureRequest, rooms: dict[str, Room], tmp_path: Path) -> Iterator[tuple[Room, str]]:
    """Where a case is served, and by which name."""
    case = CASES[request.param]
    if case.method not in WHOLE:
        yield rooms[case.base], case.name
        return
    home, folder = Home(tmp_path / "home"), rooms[case.base].base
    manifest = case.publish(home, folder)
    with answering(home, f"{case.name}@1") as client:
        yield Room(home, folder, client, {case.name: manifest}), case.name


def those(*tasks: TaskName) -> Any:
    return pytest.mark.parametrize("room", [name for name, case in CASES.items() if case.task in tasks], indirect=True)


@those("text-classification", "image-classification", "audio-classification")
def test_a_classifier_answers_as_the_plain_model(room: tuple[Room, str]) -> None:
    served, name = room
    manifest, model = served.manifests[name], served.plain(name)
    processor = TASKS[manifest.task].load_processor(served.base)
    rows = rows_of(manifest.task)
    answers = served.post("/v1/classify", model=name, input=[sent(manifest.task, row) for row in rows])["data"]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    for row, answer in zip(rows, answers, strict=True):
        wanted = expected_scores(model, manifest, row, processor)
        match manifest.problem_type:
            case "regression":
                assert answer.keys() == {"index", "value"}
                assert answer["value"] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
            case "multi_label_classification":
                assert answer.keys() == {"index", "labels", "probs", "num_classes"}
                assert answer["probs"] == pytest.approx(wanted, abs=1e-4)
                assert answer["labels"] == [label for label, p in answer["probs"].items() if p > 0.5]
            case _:
                assert answer.keys() == {"index", "label", "probs", "num_classes"}
                assert answer["probs"] == pytest.approx(wanted, abs=1e-4)
                assert answer["label"] == max(wanted, key=wanted.__getitem__)


@those("token-classification")
def test_each_word_gets_a_class(room: tuple[Room, str]) -> None:
    served, name = room
    model, processor = served.plain(name), TASKS["token-classification"].load_processor(served.base)
    texts = ["the cat sat\ton  a mat", " thank you "]
    answers = served.post("/v1/classify", model=name, input=texts)["data"]
    for text, answer in zip(texts, answers, strict=True):
        words = text.split()
        [(ids, firsts)] = word_tokens(processor, [words])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0, -len(ids) :]
        scores, best = logits[[at for at, word in enumerate(firsts) if word >= 0]].softmax(-1).max(-1)
        assert [token["text"] for token in answer["tokens"]] == words
        assert [text[token["start"] : token["end"]] for token in answer["tokens"]] == words
        assert [token["label"] for token in answer["tokens"]] == [LABELS[n] for n in best.tolist()]
        assert [token["score"] for token in answer["tokens"]] == pytest.approx(scores.tolist(), abs=1e-4)


def said_alone(model: Any, tokenizer: Any, prompt: list[int], *, end_ids: Any, tokens: int = 12) -> str:
    """Greedily by transformers, as text that comes piece by piece."""
    if not model.config.is_encoder_decoder:
        made = greedy_alone(model, prompt, tokens=tokens, end_ids=end_ids)
    else:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(input_ids=ids, do_sample=False, num_beams=1, max_new_tokens=tokens, eos_token_id=sorted(end_ids))
        made = out[0, 1:].tolist()
    text = TextStream(tokenizer)
    return "".join([text.push(token) for token in made if token not in end_ids] + [text.finish()])


@those("chat", "preference")
def test_a_conversation_goes_on_as_the_plain_model_would(room: tuple[Room, str]) -> None:
    served, name = room
    tokenizer = TASKS["chat"].load_processor(served.base)
    answer = served.post("/v1/chat/completions", model=name, messages=USER, temperature=0, max_tokens=12)
    wanted = said_alone(served.plain(name), tokenizer, encode_prompt(tokenizer, USER), end_ids=end_of_turn_ids(tokenizer))
    assert answer["choices"][0]["message"]["content"] == wanted


@those("completion", "seq2seq")
def test_a_text_goes_on_as_the_plain_model_would(room: tuple[Room, str]) -> None:
    served, name = room
    tokenizer = TASKS["completion"].load_processor(served.base)
    answer = served.post("/v1/completions", model=name, prompt=TEXTS, temperature=0, max_tokens=12)
    model = served.plain(name)
    wanted = [said_alone(model, tokenizer, tokenizer(text)["input_ids"], end_ids={tokenizer.eos_token_id}) for text in TEXTS]
    assert [choice["text"] for choice in answer["choices"]] == wanted
