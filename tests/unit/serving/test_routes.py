"""What each model says of itself, and what a request that it cannot answer is told."""

import base64
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hone.tasks import TASKS as FACTS
from hone.tasks import curl
from tests.unit.serving.rooms import CASES, USER, WHOLE, Room, picture, sound

PNG, WAV = base64.b64encode(picture(0)).decode(), base64.b64encode(sound(0)).decode()


def test_each_model_card_says_how_and_where_it_answers(rooms: dict[str, Room]) -> None:
    cards = {card["id"]: card for room in rooms.values() for card in room.client.get("/v1/models").json()["data"]}
    shown = {name: (cards[f"{name}@1"]["served"], cards[f"{name}@1"]["route"]) for name, case in CASES.items() if case.method not in WHOLE}
    assert shown["vit-image-classification-lora-single"] == ("mixed", "/v1/classify")
    assert shown["bart-seq2seq-lora"] == ("merged", "/v1/completions")
    assert shown["llama-preference-prompt"] == ("alone", "/v1/chat/completions")
    assert all(route == FACTS[CASES[name].task].route for name, (_, route) in shown.items())


@pytest.mark.parametrize(
    ("name", "route", "right"),
    [
        ("llama-completion-lora", "/v1/chat/completions", "/v1/completions"),
        ("llama-completion-ia3", "/v1/classify", "/v1/completions"),
        ("llama-preference-lora", "/v1/classify", "/v1/chat/completions"),
        ("llama-text-classification-lora-single", "/v1/completions", "/v1/classify"),
        ("bart-seq2seq-prefix", "/v1/chat/completions", "/v1/completions"),
        ("vit-image-classification-lora-single", "/v1/chat/completions", "/v1/classify"),
    ],
)
def test_the_wrong_route_is_a_400_that_names_the_right_one(rooms: dict[str, Room], name: str, route: str, right: str) -> None:
    body = {"messages": USER, "prompt": "x", "input": "x"}
    response = rooms[name.partition("-")[0]].client.post(route, json={"model": name, **body})
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith(f"POST {right}")
    assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("name", "value", "nothing"),
    [
        ("functions", [{"name": "f"}], []),
        ("repetition_penalty", 1.2, 1.0),
        ("guided_json", {"type": "object"}, None),
        ("structured_outputs", {"regex": "a+"}, None),
        ("stop_token_ids", [3], []),
        ("min_tokens", 5, 0),
        ("ignore_eos", True, False),
        ("continue_final_message", True, False),
    ],
)
def test_what_would_change_the_answer_and_is_not_done_is_refused_by_name(
    rooms: dict[str, Room], name: str, value: Any, nothing: Any
) -> None:
    body = {"model": "llama-chat-lora", "messages": USER, "max_tokens": 2}
    client = rooms["llama"].client
    response = client.post("/v1/chat/completions", json={**body, name: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    assert client.post("/v1/chat/completions", json={**body, name: nothing}).status_code == 200


def test_a_load_balancer_may_ask_by_head(rooms: dict[str, Room]) -> None:
    assert rooms["llama"].client.head("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("vit-image-classification-lora-single", {"image": "http://169.254.169.254/secret"}, "addresses and paths are not read"),
        ("vit-image-classification-lora-single", {"image": "/etc/passwd"}, "addresses and paths are not read"),
        ("vit-image-classification-lora-single", {"image": "file:///etc/passwd"}, "addresses and paths are not read"),
        ("vit-image-classification-lora-single", {"image": ""}, "is not base64"),
        ("vit-image-classification-lora-single", {"image": 7}, "is not base64"),
        ("vit-image-classification-lora-single", {"image": "Zm9v"}, "no picture that can be read"),
        ("vit-image-classification-lora-single", [{"image": PNG}, {"image": PNG[:400]}], "input[1].image: "),
        ("vit-image-classification-lora-single", {"image": WAV}, "no picture that can be read"),
        ("vit-image-classification-ia3-single", {"audio": WAV}, "is a sound, and vit-image-classification-ia3-single@1 reads a picture"),
        ("vit-image-classification-lora-single", "a cat", "is a text, and"),
        ("vit-image-classification-lora-single", {"image": PNG, "audio": WAV}, 'an input is a text, {"image"'),
        ("vit-image-classification-lora-single", {"video": PNG}, 'an input is a text, {"image"'),
        ("vit-image-classification-lora-single", [], "at least 1 item"),
        ("vit-image-classification-lora-single", [{"image": PNG}] * 257, "at most 256"),
        ("ast-audio-classification-lora-single", {"audio": PNG}, "input[0].audio: "),
        ("ast-audio-classification-lora-single", {"audio": WAV[:3000]}, "cut short"),
        ("ast-audio-classification-lora-single", {"image": PNG}, "is a picture, and"),
        ("bert-token-classification-lora", " \n", "an input is empty"),
        ("bert-token-classification-lora", "word " * 300, "the context of this server is"),
        ("bert-token-classification-lora", {"image": PNG}, "is a picture, and"),
        ("bert-text-classification-prompt-single", "a " * 125, "the context of this server is 123 tokens"),
    ],
)
def test_what_cannot_be_classified_is_a_400_that_says_why(rooms: dict[str, Room], name: str, value: Any, said: str) -> None:
    response = rooms[name.partition("-")[0]].client.post("/v1/classify", json={"model": name, "input": value})
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]
    assert response.json()["error"]["param"].startswith("input")


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 300), (4, 3)])
def test_a_picture_may_be_of_any_size(rooms: dict[str, Room], size: tuple[int, int]) -> None:
    stream = io.BytesIO()
    Image.new("RGBA", size, (255, 0, 0, 128)).save(stream, "PNG")
    small = {"image": base64.b64encode(stream.getvalue()).decode()}
    answer = rooms["vit"].post("/v1/classify", model="vit-image-classification-lora-single", input=small)["data"][0]
    assert sum(answer["probs"].values()) == pytest.approx(1)


def test_a_data_uri_is_what_is_in_it(rooms: dict[str, Room]) -> None:
    name = "vit-image-classification-lora-single"
    plain, uri = ({"image": PNG}, {"image": f"data:image/png;base64,{PNG}"})
    first, second = rooms["vit"].post("/v1/classify", model=name, input=[plain, uri])["data"]
    assert first["probs"] == pytest.approx(second["probs"])


@pytest.mark.parametrize("name", [name for name in CASES if "-lora" in name])
def test_the_command_that_a_card_gives_is_answered(name: str, rooms: dict[str, Room], tmp_path: Path) -> None:
    case = CASES[name]
    file = tmp_path / "file"
    file.write_bytes(sound(0) if FACTS[case.task].shape == "audio" else picture(0))
    command = curl(case.task, name, url="http://127.0.0.1:8000").replace("FILE", str(file))
    # The shell's own reading of it, with a curl that shows what it was told.
    shown = 'curl() { echo "$1"; if [ "${@: -1}" = @- ]; then cat; else echo "${@: -1}"; fi; }\n' + command
    url, body = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout.split("\n", 1)
    rooms[case.base].post(url.removeprefix("http://127.0.0.1:8000"), **json.loads(body))
