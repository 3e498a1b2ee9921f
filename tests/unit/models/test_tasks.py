"""What each task makes of a row, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hone.base_model import find_base_model
from hone.errors import BaseModelError, DataError
from hone.storage import Home
from models.tasks import TASKS, Head, Inputs
from models.tasks.task import IGNORED
from models.tasks.tokenizer import load_tokenizer
from tests.tiny import make_bart, make_vit


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return load_tokenizer(llama)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bart(tmp_path_factory.mktemp("bart"))


def test_a_long_text_becomes_several_rows_and_every_token_but_the_first_of_each_is_learnt(tokenizer: Any) -> None:
    text = "the cat sat on a mat and the dog ran to the river"
    [pieces] = TASKS["completion"].encode([{"text": text}], tokenizer, max_length=8)
    assert not isinstance(pieces, DataError)
    ids = np.concatenate([piece.input_ids for piece in pieces])
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert all(len(piece.input_ids) <= 8 for piece in pieces)
    for piece in pieces:
        assert piece.labels[0] == IGNORED
        assert (piece.labels[1:] == piece.input_ids[1:]).all()
        assert piece.n_targets == len(piece.input_ids) - 1


def test_a_class_stands_at_the_first_token_of_its_word(tokenizer: Any) -> None:
    row = {"tokens": ["the", "riverbank", "Zürich"], "labels": ["O", "O", "LOC"]}
    [[made]] = TASKS["token-classification"].encode([row], tokenizer, max_length=64)
    firsts = np.flatnonzero(made.labels >= 0)
    assert made.labels[firsts].tolist() == [0, 1, 2]
    words = [tokenizer.decode(part) for part in np.split(made.input_ids, firsts[1:])]
    assert words == row["tokens"]
    assert (made.n_targets, made.classes) == (3, ("O", "O", "LOC"))


def test_a_word_that_the_tokenizer_drops_is_named(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    [refused] = TASKS["token-classification"].encode([{"tokens": ["the", ""], "labels": ["O", "O"]}], tokenizer, max_length=64)
    assert isinstance(refused, DataError)
    assert "tokens[1]" in refused.message


def test_the_decoder_reads_the_target_one_place_to_the_right(bart: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    task, tokenizer = TASKS["seq2seq"], load_tokenizer(bart)
    rows = [{"source": "the cat", "target": "sat on a mat"}, {"source": "a small dog ran", "target": "river"}]
    encoded = [made for [made] in task.encode(rows, tokenizer, max_length=32)]  # type: ignore[misc]
    batch = task.collate(
        [{"input_ids": made.input_ids, "labels": made.labels} for made in encoded], inputs=Inputs(tokenizer.pad_token_id), packed=False
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(bart).eval()
    with torch.no_grad():
        loss, sums = task.loss(model, batch)
        theirs = model(**batch).loss  # transformers shifts the labels itself
    assert float(loss) / sum(made.n_targets for made in encoded) == pytest.approx(float(theirs), rel=1e-5)
    assert encoded[0].labels[-1] == tokenizer.eos_token_id
    assert set(sums) == {"token_accuracy"}


def test_dpo_is_the_loss_of_the_paper(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    task, tokenizer = TASKS["preference"], load_tokenizer(llama)
    rows = [
        {
            "prompt": [{"role": "user", "content": "say a word"}],
            "chosen": [{"role": "assistant", "content": "river"}],
            "rejected": [{"role": "assistant", "content": "an old stone house"}],
        }
    ]
    [[made]] = task.encode(rows, tokenizer, max_length=64)
    row = {"input_ids": made.input_ids, "labels": made.labels, "parts": made.parts}
    model, base = (AutoModelForCausalLM.from_pretrained(llama).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        expected = -torch.nn.functional.logsigmoid(0.3 * (likelihoods(model, row) - likelihoods(base, row)))
        weights = {name: p.clone() for name, p in model.named_parameters()}

        from contextlib import contextmanager

        from models.tasks import LossOptions

        @contextmanager
        def as_base() -> Any:
            model.load_state_dict(base.state_dict())
            yield
            model.load_state_dict(weights)

        nothing = task.nothing(Inputs(0))
        for packed in (False, True):
            from hone.recipe import TrainSettings
            from training.forward import choose_packing

            if packed:
                assert choose_packing(model, task, TrainSettings())
            batch = task.collate([row, nothing], inputs=Inputs(0), packed=packed)
            loss, sums = task.loss(model, batch, LossOptions(beta=0.3, base=as_base))
            assert float(loss) == pytest.approx(float(expected), rel=1e-4)
            assert float(sums["reward_accuracy"]) in (0.0, 1.0)


def likelihoods(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """log p(chosen) - log p(rejected), each answer read by itself."""
    first = row["parts"][0]
    sums = []
    for part in (slice(first), slice(first, None)):
        ids, labels = torch.tensor(row["input_ids"][part])[None].long(), torch.tensor(row["labels"][part])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        at = (labels != IGNORED).nonzero()[:, 0]
        sums.append(log_probs[at - 1, labels[at].long()].sum())
    return sums[0] - sums[1]


def test_the_same_answer_twice_is_no_preference(tokenizer: Any) -> None:
    row = {
        "prompt": [{"role": "user", "content": "x"}],
        **{side: [{"role": "assistant", "content": "y"}] for side in ("chosen", "rejected")},
    }
    [refused] = TASKS["preference"].encode([row], tokenizer, max_length=64)
    assert isinstance(refused, DataError)
    assert "nothing to prefer" in refused.message


@pytest.mark.parametrize(
    ("answers", "counted", "expected"),
    [
        ({"label"}, {"b": 1, "a": 2}, Head(["a", "b"], "single_label_classification")),
        ({"classes"}, {"a": 1}, Head(["a"], "multi_label_classification")),
        ({"number"}, {}, Head(None, "regression")),
    ],
)
def test_the_rows_say_what_the_head_answers(answers: set[str], counted: dict[str, int], expected: Head) -> None:
    assert TASKS["text-classification"].find_head(counted, answers) == expected


@pytest.mark.parametrize(
    ("answers", "counted", "said"),
    [
        ({"label"}, {"a": 3}, "only one class, 'a'"),
        ({"label", "number"}, {"a": 3}, r"some rows have 'label' \(one class\) and others 'number'"),
    ],
)
def test_rows_that_do_not_agree_on_it_are_refused(answers: set[str], counted: dict[str, int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        TASKS["image-classification"].find_head(counted, answers)


def test_as_many_outputs_of_other_classes_are_a_new_head(bert: Path, tmp_path: Path) -> None:
    task = TASKS["text-classification"]
    make = {"dtype": torch.float32, "pad_token_id": 0}
    model, fresh = task.load_model(bert, head=Head(["a", "b"], "single_label_classification"), **make)
    assert fresh == {"classifier.weight", "classifier.bias"}
    model.save_pretrained(tmp_path)
    _, same = task.load_model(tmp_path, head=Head(["a", "b"], "single_label_classification"), **make)
    _, other = task.load_model(tmp_path, head=Head(["c", "d"], "single_label_classification"), **make)
    assert same == set()
    assert other == fresh


def test_a_base_of_another_kind_is_refused(llama: Path, bert: Path, bart: Path, tmp_path: Path, home: Home) -> None:
    with pytest.raises(BaseModelError, match="task completion needs a causal language model"):
        TASKS["completion"].check_base(find_base_model(str(bert), home=home))
    with pytest.raises(BaseModelError, match="task seq2seq needs an encoder-decoder"):
        TASKS["seq2seq"].check_base(find_base_model(str(llama), home=home))
    with pytest.raises(BaseModelError, match="no image processor"):
        TASKS["image-classification"].load_processor(bart)
    assert TASKS["image-classification"].load_processor(make_vit(tmp_path)).size["height"] == 32


def test_what_counts_for_nothing_has_no_probabilities_and_no_other_metric(bert: Path) -> None:
    task = TASKS["text-classification"]
    for problem, answer, labels in (
        ("single_label_classification", np.array([1]), ["a", "b"]),
        ("multi_label_classification", np.array([1.0, 0.0], dtype=np.float32), ["a", "b"]),
        ("regression", np.array([2.0], dtype=np.float32), None),
    ):
        head = Head(labels, problem)  # type: ignore[arg-type]
        model, _ = task.load_model(bert, head=head, dtype=torch.float32, pad_token_id=0)
        row = {"input_ids": [1, 2, 3], "labels": answer}
        alone, padded, nothing = (
            task.collate(rows, inputs=Inputs(0), packed=False)
            for rows in ([row], [row, task.nothing(Inputs(0))], [task.nothing(Inputs(0))] * 2)
        )
        with torch.no_grad():
            loss, sums = task.loss(model.eval(), alone)
            same, _ = task.loss(model, padded)
            none, sums_of_none = task.loss(model, nothing)
        assert float(same) == pytest.approx(float(loss), rel=1e-4)
        assert float(none) == 0
        assert sums.keys() == sums_of_none.keys()
        if problem != "regression":
            with torch.no_grad():
                assert set(task.log_probs(model, padded)[1].tolist()) == {0}
                assert len(task.log_probs(model, nothing)[0]) == 0


def test_one_missing_vector_does_not_make_a_head_of_the_whole_encoder(bert: Path) -> None:
    task = TASKS["text-classification"]
    model, fresh = task.load_model(bert, head=Head(["a", "b"], "single_label_classification"), dtype=torch.float32, pad_token_id=0)
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert task.head_modules(model, fresh | pooler) == ["classifier", "bert.pooler.dense"]
    assert task.head_modules(model, fresh | {"bert.embeddings.word_embeddings.weight"}) == ["classifier", "bert.embeddings.word_embeddings"]
    assert task.head_modules(model, fresh | {"bert.embeddings.LayerNorm.weight"}) == ["classifier"]


def test_positions_that_begin_after_the_padding_are_not_counted(bert: Path, tmp_path: Path, home: Home) -> None:
    import json
    import shutil

    shutil.copytree(bert, tmp_path / "roberta")
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "roberta" / "config.json").write_text(json.dumps({**config, "model_type": "roberta", "pad_token_id": 1}))
    assert find_base_model(str(bert), home=home).max_context == 128
    assert find_base_model(str(tmp_path / "roberta"), home=home).max_context == 126
