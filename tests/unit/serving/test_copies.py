"""Copies of the base: in the company of mixed rows, in turn, and refused where none are kept."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SwinConfig, SwinModel, ViTImageProcessorPil

from hone.storage import Home
from tests.serving_fixtures import load_plainly, publish_trained
from tests.unit.serving.rooms import CASES, SINGLE, TEXTS, Room, answering, asked, expected_scores, picture, rows_of, sent


@pytest.mark.parametrize("base", ["bert", "vit", "ast"])
def test_mixed_rows_equal_each_alone_and_merged_and_alone_models_answer_in_their_company(base: str, rooms: dict[str, Room]) -> None:
    """Requests of every adapter of a base at once, which batch as they may."""
    served = rooms[base]
    work = [(name, sent(manifest.task, row)) for name, manifest in served.manifests.items() for row in asked(manifest.task)]
    alone = [served.post("/v1/classify", model=name, input=value)["data"] for name, value in work]
    with ThreadPoolExecutor(len(work)) as pool:
        together = list(pool.map(lambda item: served.post("/v1/classify", model=item[0], input=item[1])["data"], work))
    for one, other in zip(alone, together, strict=True):
        assert numbers(other) == pytest.approx(numbers(one), abs=1e-4)


def test_copies_generate_in_the_company_of_mixed_rows(rooms: dict[str, Room]) -> None:
    served = rooms["llama"]
    names = [f"llama-{task}" for task in ("completion-lora", "completion-ia3", "completion-prefix", "preference-lora")]

    def said(name: str) -> list[str]:
        made = served.post("/v1/completions", model=name, prompt=TEXTS, temperature=0, max_tokens=10)
        return [choice["text"] for choice in made["choices"]]

    alone = {name: said(name) for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
        assert dict(zip(names, pool.map(said, names), strict=True)) == alone


@pytest.mark.parametrize("name", ["llama-completion-adapter", "llama-completion-prompt", "bart-seq2seq-lora"])
def test_a_copy_samples_stops_and_streams_as_the_mixed_engine_does(name: str, rooms: dict[str, Room]) -> None:
    served = rooms[name.partition("-")[0]]
    asked = {"model": name, "prompt": TEXTS[:2], "n": 2, "max_tokens": 16, "seed": 5, "temperature": 1.5}
    answer = served.post("/v1/completions", **asked)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) == 4, "each choice draws by itself"
    assert [choice["text"] for choice in served.post("/v1/completions", **asked)["choices"]] == texts
    assert answer["usage"]["completion_tokens"] <= 4 * 16
    letter = next(character for character in texts[0] if character.isascii() and character.isalpha())
    stopped = served.post("/v1/completions", **asked, stop=letter)["choices"]
    assert stopped[0]["text"] == texts[0].partition(letter)[0]
    assert stopped[0]["finish_reason"] == "stop"
    response = served.client.post("/v1/completions", json={**asked, "stream": True})
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line.startswith("data: {")]
    pieces = [choice for chunk in chunks for choice in chunk["choices"]]
    assert ["".join(piece["text"] for piece in pieces if piece["index"] == n) for n in range(4)] == texts


def test_copies_leave_in_turn_and_mixed_adapters_stay(rooms: dict[str, Room]) -> None:
    served = rooms["vit"]
    picked = {"image": base64.b64encode(picture(0)).decode()}
    for kind in ("lora", "ia3", "adapter"):
        for problem in ("single", "multi"):
            served.post("/v1/classify", model=f"vit-image-classification-{kind}-{problem}", input=picked)
    status = served.client.get("/healthz").json()
    assert status["copies"] == [f"vit-image-classification-adapter-{problem}@1" for problem in ("single", "multi")]
    assert {f"vit-image-classification-lora-{problem}@1" for problem in ("single", "multi")} <= set(status["adapters"])


def test_a_server_that_keeps_no_copies_says_so(bert: Path, home: Home) -> None:
    case = CASES["bert-text-classification-ia3-single"]
    case.publish(home, bert)
    with answering(home, str(bert), max_copies=0) as client:
        response = client.post("/v1/classify", json={"model": case.name, "input": "x"})
        assert response.status_code == 404
        assert "keeps no copies; start it with max_copies of at least 1" in response.json()["error"]["message"]
        assert case.name not in {card["id"].partition("@")[0] for card in client.get("/v1/models").json()["data"]}


def test_a_copy_that_does_not_reproduce_its_recorded_outputs_is_refused(bart: Path, home: Home) -> None:
    case = CASES["bart-seq2seq-ia3"]
    publish_trained(home, bart, "off", task=case.task, method=case.method, rows=rows_of(case.task), shift=0.5)
    with answering(home, str(bart)) as client:
        response = client.post("/v1/completions", json={"model": "off", "prompt": "x"})
        assert response.status_code == 500
        assert "does not reproduce the outputs recorded" in response.json()["error"]["message"]


def test_lora_on_a_base_whose_layers_do_not_see_rows_is_served_from_a_copy(home: Home, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, initializer_range=0.2)
    SwinModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    rows = rows_of("image-classification")
    manifest = publish_trained(home, tmp_path, "swin", task="image-classification", method="lora", rows=rows, head=SINGLE, r=2)
    wanted = expected_scores(load_plainly(home, tmp_path, manifest), manifest, rows[0], ViTImageProcessorPil.from_pretrained(tmp_path))
    with answering(home, str(tmp_path)) as client:
        [answer] = client.post("/v1/classify", json={"model": "swin", "input": sent("image-classification", rows[0])}).json()["data"]
        assert answer["probs"] == pytest.approx(wanted, abs=1e-4)
        assert client.get("/healthz").json()["copies"] == ["swin@1"]


def numbers(answers: Any) -> list[float]:
    """Everything in an answer that was computed, in order."""
    found = []
    for answer in answers:
        found += (
            [token["score"] for token in answer.get("tokens", [])] + list(answer.get("probs", {}).values()) + [answer.get("value", 0.0)]
        )
    return found
