"""What vLLM is told, and what it says: the names are those of its own classes. A GPU that has it runs it; elsewhere that is skipped."""

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from hone.errors import BaseModelError, ResourceError
from hone.recipe.serving import VllmSettings
from serving.app import ServeArgs
from serving.base import Engine
from serving.engine.sampling import Chosen
from serving.engine.streams import LoraFiles
from serving.engine.vllm import MOST_LOGPROBS, chosen_tokens, engine_settings, lora_settings, sampling_settings
from serving.ingress import make_app
from serving.replica import Replica
from tests.unit.serving.conftest import Shelf
from tests.unit.serving.rooms import USER
from tests.unit.serving.rows import row

HAS_VLLM = importlib.util.find_spec("vllm") is not None
NAMES = {
    "engine": {
        *("model", "trust_remote_code", "load_format", "generation_config", "max_model_len", "max_num_seqs", "gpu_memory_utilization"),
        *("enforce_eager", "tensor_parallel_size", "distributed_executor_backend", "enable_prefix_caching", "enable_lora", "max_loras"),
        *("max_lora_rank", "max_cpu_loras", "max_logprobs", "logprobs_mode", "disable_log_stats", "structured_outputs_config"),
    },
    "sampling": {
        *("n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "seed"),
        *("max_tokens", "stop_token_ids", "ignore_eos", "detokenize", "output_kind", "logprob_token_ids"),
        "structured_outputs",
    },
    "lora": {"lora_name", "lora_int_id", "lora_path"},
}
"""Fields of AsyncEngineArgs, SamplingParams and LoRARequest in vLLM 0.29.0, as far as they are used; read in its source."""


def engine_of(**settings: Any) -> dict[str, Any]:
    rows = {"max_rows": 256, "max_context": None, "max_adapters": 64}
    return engine_settings(Path("/base"), **{**rows, "settings": VllmSettings(), **settings})


def test_every_name_is_one_that_vllm_knows(engine: Engine) -> None:
    one = row(engine.base, [5, 6])
    assert engine_of().keys() <= NAMES["engine"]
    assert sampling_settings(one).keys() <= NAMES["sampling"]
    assert lora_settings(LoraFiles("a@1", "d", Path("/a"), 4), 1).keys() == NAMES["lora"]


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed here: gigabytes of wheels for NVIDIA GPUs (pip install 'hone[vllm]')")
def test_the_names_are_those_of_the_installed_vllm() -> None:
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    assert "backend" in {field.name for field in fields(StructuredOutputsConfig)}
    assert "grammar" in {field.name for field in fields(StructuredOutputsParams)}
    assert NAMES["engine"] <= {field.name for field in fields(AsyncEngineArgs)}
    assert NAMES["sampling"] <= set(SamplingParams.__struct_fields__)
    assert NAMES["lora"] <= set(LoRARequest.__struct_fields__)


def test_every_setting_of_a_request_is_passed_on(engine: Engine) -> None:
    asked = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 12,
        "min_p": 0.05,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "logit_bias": {7: -100.0},
        "logprobs": 5,
    }
    told = sampling_settings(row(engine.base, [5, 6], max_tokens=9, **asked))
    assert asked.items() <= told.items()
    assert told["max_tokens"] == 9
    assert told["stop_token_ids"] == sorted(engine.base.end_ids)


def test_what_ends_and_spells_an_answer_stays_with_hone(engine: Engine) -> None:
    """Stop strings and text are the row's own; vLLM must neither look for them nor end where the base would."""
    told = sampling_settings(row(engine.base, [5], stop=("cat",)))
    assert (told["ignore_eos"], told["detokenize"], "stop" in told) == (True, False, False)


def test_choices_of_a_seeded_request_differ_and_come_again(engine: Engine) -> None:
    def seeds(seed: int | None) -> list[Any]:
        return [sampling_settings(row(engine.base, [5], seed=seed, choice=choice, temperature=1.0))["seed"] for choice in range(3)]

    assert seeds(4) == seeds(4)
    assert len({*seeds(4), *seeds(5)}) == 6
    assert seeds(None) == [None] * 3  # a generator for each row makes vLLM slower


def test_a_greedy_row_without_wishes_says_little(engine: Engine) -> None:
    told = sampling_settings(row(engine.base, [5]))
    assert (told["temperature"], told["logit_bias"], told["logprobs"]) == (0.0, None, None)


def test_what_the_engine_is_told() -> None:
    told = engine_of(settings=VllmSettings(tensor_parallel_size=2, max_loras=100, max_lora_rank=32))
    assert (told["tensor_parallel_size"], told["distributed_executor_backend"]) == (2, "mp")
    assert (told["max_loras"], told["max_cpu_loras"]) == (64, 64)  # vLLM refuses fewer in memory than in a batch
    assert told["max_model_len"] == -1
    assert engine_of(max_context=4096)["max_model_len"] == 4096
    assert told["logprobs_mode"] == "raw_logprobs"  # before temperature, filters, penalties and biases, as the slot engine's
    assert told["load_format"] == "safetensors"  # never pickle
    assert told["trust_remote_code"] is False


def test_adapters_are_told_apart_by_digest() -> None:
    told = lora_settings(LoraFiles("bot@1", "abc", Path("/home/bot/1"), 4), 7)
    assert told == {"lora_name": "abc", "lora_int_id": 7, "lora_path": "/home/bot/1"}


def score(logprob: float, rank: int) -> Any:
    """Has the fields of vLLM's Logprob."""
    return SimpleNamespace(logprob=logprob, rank=rank, decoded_token=None)


def test_log_probabilities_are_those_of_the_likeliest_by_rank() -> None:
    told = [{9: score(-4.0, 30), 1: score(-0.1, 1), 2: score(-2.0, 2)}, {1: score(-0.5, 1), 2: score(-1.5, 2)}]
    assert chosen_tokens([9, 1], told, 2) == [
        Chosen(9, -4.0, ((1, -0.1), (2, -2.0))),
        Chosen(1, -0.5, ((1, -0.5), (2, -1.5))),
    ]
    assert chosen_tokens([9], told[:1], 0) == [Chosen(9, -4.0)]
    assert chosen_tokens([9, 1], None, None) == [Chosen(9), Chosen(1)]


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed here, so nothing says that it is not")
def test_without_the_package_a_replica_says_what_to_install(chat_shelf: Shelf) -> None:
    with pytest.raises(ResourceError, match=r"pip install 'hone\[vllm\]'"):
        Replica(base=str(chat_shelf.base), home=str(chat_shelf.home.root), engine="vllm")


def test_the_application_takes_the_engine_and_its_settings() -> None:
    args = ServeArgs.model_validate({"base": "b", "engine": "vllm", "vllm": {"tensor_parallel_size": 2}})
    assert (args.engine, args.vllm.tensor_parallel_size, args.max_rows) == ("vllm", 2, None)
    assert ServeArgs(base="b").engine == "slots"
    for wrong in ({"engine": "sglang"}, {"vllm": {"tensor_parallel": 2}}, {"vllm": {"max_lora_rank": 20}}):
        with pytest.raises(ValueError, match=r"engine|tensor_parallel|max_lora_rank"):
            ServeArgs.model_validate({"base": "b", **wrong})


needs_a_gpu = pytest.mark.skipif(
    not HAS_VLLM or not torch.cuda.is_available(), reason="runs vLLM itself: needs hone[vllm] and an NVIDIA GPU, and this machine lacks one"
)


@needs_a_gpu
def test_vllm_answers_the_base_and_its_adapters_as_the_slot_engine_does(chat_shelf: Shelf) -> None:
    settings = {"base": str(chat_shelf.base), "home": str(chat_shelf.home.root), "max_context": 128}
    slots = Replica(**settings)
    vllm = Replica(**settings, engine="vllm", vllm=VllmSettings(gpu_memory_utilization=0.3, max_lora_rank=8, enforce_eager=True))
    with TestClient(make_app(slots, chat_shelf.registry)) as one, TestClient(make_app(vllm, chat_shelf.registry)) as other:
        for model in (str(chat_shelf.base), "narrow", "wide"):
            body = {"model": model, "messages": USER, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 5}
            first, second = (client.post("/v1/chat/completions", json=body).json()["choices"][0] for client in (one, other))
            # The first token alone is sure to be asked with the same prompt: in 16 bits, ties fall differently.
            one_place, other_place = (choice["logprobs"]["content"][0] for choice in (first, second))
            assert one_place["logprob"] == pytest.approx(other_place["logprob"], abs=0.1)
            assert len(other_place["top_logprobs"]) == 5
        seeded = {"model": "wide", "messages": USER, "max_tokens": 8, "seed": 3, "n": 2, "stop": ["a"]}
        texts = [[c["message"]["content"] for c in other.post("/v1/chat/completions", json=seeded).json()["choices"]] for _ in range(2)]
        assert texts[0] == texts[1]
        assert not any("a" in text for text in texts[0])
        schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"], "additionalProperties": False}
        follows = {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}, "max_tokens": 40}
        held = other.post("/v1/chat/completions", json={"model": "wide", "messages": USER, **follows}).json()["choices"][0]
        assert json.loads(held["message"]["content"]).keys() == {"sure"}
    slots.stop()
    vllm.stop()


def test_an_encoder_is_refused_before_anything_is_loaded(label_shelf: Shelf) -> None:
    from hone.base_model import find_base_model
    from serving.streamed import check_decoder

    with pytest.raises(BaseModelError, match="--engine slots"):
        check_decoder(find_base_model(str(label_shelf.base), home=label_shelf.home), None, "vllm")


def test_no_more_log_probabilities_are_asked_for_than_vllm_gives() -> None:
    from serving.schemas import ChatRequest

    assert engine_of()["max_logprobs"] == MOST_LOGPROBS
    with pytest.raises(ValueError, match="top_logprobs"):
        ChatRequest.model_validate({"model": "m", "messages": USER, "logprobs": True, "top_logprobs": MOST_LOGPROBS + 1})
