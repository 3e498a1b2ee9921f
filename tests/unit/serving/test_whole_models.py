"""A full fine-tune is served as a base of its own, under its published name."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hone.base_model import find_base_model
from hone.chat import encode_prompt, end_of_turn_ids, ensure_template
from hone.manifest import AdapterManifest
from hone.registry import Registry
from hone.storage import Home
from serving.calls import ChatCall, Classified, ClassifyCall, Piece, Sampling, Scores, Started
from serving.replica import Replica
from tests.manifests import Describe
from tests.serving_fixtures import greedy_alone

LABELS = ["angry", "calm", "merry"]
TEXTS = ["the cat sat on a mat", "hello"]


def publish_whole(home: Home, base: Path, folder: Path, *, task: str, labels: list[str] | None) -> AdapterManifest:
    found = find_base_model(str(base), home=home).id
    describe = Describe("whole", kind="full", method="full", served="whole", task=task, base=found, labels=labels, metrics={})
    return Registry(home).publish(folder, "whole", describe=describe)


@pytest.mark.anyio
async def test_a_whole_classifier_answers_with_its_own_head(bert: Path, home: Home, tmp_path: Path) -> None:
    names = dict(enumerate(LABELS))
    numbers = {name: n for n, name in names.items()}
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3, id2label=names, label2id=numbers)
    model.save_pretrained(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(tmp_path / "whole")
    publish_whole(home, bert, tmp_path / "whole", task="text-classification", labels=LABELS)
    replica = Replica(base="whole@1", home=str(home.root))
    try:
        answer = await replica.classify(ClassifyCall("whole@1", TEXTS))
    finally:
        replica.stop()
    assert isinstance(answer, Classified)
    assert (answer.served, answer.labels) == ("whole@1", tuple(LABELS))
    for text, row in zip(TEXTS, answer.answers, strict=True):
        with torch.no_grad():
            expected = model.eval()(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert isinstance(row, Scores)
        assert row.probabilities == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.anyio
async def test_a_whole_chat_model_answers_under_its_published_name(llama: Path, home: Home, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "whole"))
    publish_whole(home, llama, folder, task="chat", labels=None)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ensure_template(tokenizer)
    messages = [{"role": "user", "content": "why does it rain?"}]
    alone = greedy_alone(
        AutoModelForCausalLM.from_pretrained(llama).eval(),
        encode_prompt(tokenizer, messages),
        tokens=8,
        end_ids=sorted(end_of_turn_ids(tokenizer)),
    )
    replica = Replica(base="whole@1", home=str(home.root))
    try:
        call = ChatCall("whole", messages, 1, Sampling(max_tokens=8, temperature=0, top_p=1, seed=None, stop=()))
        events = await replica.answer(call)
    finally:
        replica.stop()
    assert isinstance(events[0], Started)
    assert events[0].served == "whole@1"
    said, expected = "".join(e.text for e in events if isinstance(e, Piece)), tokenizer.decode(alone, skip_special_tokens=True)
    assert said == expected.removesuffix("\N{REPLACEMENT CHARACTER}"), "half a character at the end is not given out"
