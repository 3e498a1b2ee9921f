"""Tokens a second of 32 rows over 16 LoRA adapters: the slot engine against PEFT's mixed batches, PEFT one adapter after another, and the
engine on the base alone.

A random Llama (6 layers, hidden 256, 8k vocabulary), rank 8 on all linear layers, prompts of one length, greedy. All rows are there from
the start, which is the best case for PEFT: its batch neither waits for a longer row nor for rows that are yet to come. The engine also
turns its tokens into text. Every variant must make the same tokens, or nothing is measured.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import interleave, ratios, save, summary
from serving.engine.decoder import Decoder
from serving.engine.generation import Generation
from serving.engine.lora import AdapterWeights, Mixer
from serving.engine.row import Row
from serving.engine.sampling import make_chooser
from serving.engine.text import TextStream
from serving.loading import split_weights
from training.sample import byte_level_tokenizer

VOCABULARY = 8192
ADAPTERS = 16
ROWS = 32
CONTEXT = 1024
NEW_TOKENS = 64
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
Prompts = Sequence[Sequence[int]]
Answers = list[list[int]]


def main() -> None:
    """Measure, for each length of the prompts, and write results/engine.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    args = parser.parse_args()
    peft, decoder, adapters = _models(args.adapters)
    generation = Generation(decoder, max_rows=args.rows, max_context=CONTEXT)
    tokenizer = byte_level_tokenizer(["the cat sat on a mat"], vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    figures: dict[str, Any] = {}
    for length in args.prompts:
        prompts = torch.randint(3, VOCABULARY, (args.rows, length)).tolist()
        owners = [n % args.adapters for n in range(args.rows)]
        makers: dict[str, Callable[[], Answers]] = {
            "engine": partial(_engine, generation, tokenizer, prompts, [adapters[n] for n in owners], args.new_tokens),
            "peft_mixed": partial(_peft_mixed, peft, prompts, owners, args.new_tokens),
            "one_after_another": partial(_one_after_another, peft, prompts, owners, args.new_tokens),
            "engine_without_adapters": partial(_engine, generation, tokenizer, prompts, [None] * args.rows, args.new_tokens),
        }
        _check(makers)
        measured = interleave({name: partial(_tokens_a_second, make) for name, make in makers.items()}, repeats=args.repeats)
        figures[str(length)] = {name: summary(values) for name, values in measured.items()}
        figures[str(length)] |= {f"to_{name}": ratios(measured, of="engine", to=name) for name in list(makers)[1:]}
    notes = {"adapters": args.adapters, "rows": args.rows, "new_tokens": args.new_tokens, "threads": torch.get_num_threads()}
    path = save("engine", unit="tokens a second", figures=figures, notes=notes)
    for length, found in figures.items():
        told = ", ".join(f"{name[3:]} {figure['median']:.2f}" for name, figure in found.items() if name.startswith("to_"))
        print(f"prompts of {length}: {found['engine']['median']:.0f} tokens/s; times {told}")  # noqa: T201
    print(path)  # noqa: T201


def _models(count: int) -> tuple[Any, Decoder, list[AdapterWeights]]:
    """The same base twice, with PEFT's adapters and with the engine's wrapped layers; and those adapters as the engine holds them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    plain, wrapped = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    wrapped.load_state_dict(plain.state_dict())
    peft = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **LORA), "0")
    for n in range(1, count):
        peft.add_adapter(str(n), LoraConfig(task_type="CAUSAL_LM", **LORA))
    decoder = Decoder(wrapped.requires_grad_(False), Mixer(wrapped))
    adapters = []
    for n in range(count):
        own = {name: p for name, p in peft.named_parameters() if f".{n}.weight" in name and "lora_" in name}
        for parameter in own.values():
            parameter.data.normal_(std=0.1)
        state = {name.replace(f".{n}.weight", ".weight"): p.detach().clone() for name, p in own.items()}
        layers, _ = split_weights(state, LORA, decoder.mixer.shapes, device=decoder.device, dtype=torch.float32)
        adapters.append(AdapterWeights(layers, digest=str(n)))
    return peft.eval(), decoder, adapters


def _engine(generation: Generation, tokenizer: Any, prompts: Prompts, adapters: Sequence[AdapterWeights | None], tokens: int) -> Answers:
    rows = [
        Row(
            prompt=prompt,
            adapter=adapter,
            chooser=make_chooser(seed=None, choice=0, temperature=0.0),
            text=TextStream(tokenizer),
            end_ids=frozenset(),
            max_tokens=tokens,
            emit=lambda _: None,
        )
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    generation.add(rows)
    with torch.inference_mode():
        while generation.step():
            pass
    return [row.made for row in rows]


def _peft_mixed(peft: Any, prompts: Prompts, owners: Sequence[int], tokens: int) -> Answers:
    return _generated(peft, prompts, tokens, adapter_names=[str(n) for n in owners])


def _one_after_another(peft: Any, prompts: Prompts, owners: Sequence[int], tokens: int) -> Answers:
    answers: dict[int, list[int]] = {}
    for adapter in sorted(set(owners)):
        peft.set_adapter(str(adapter))
        own = [row for row, owner in enumerate(owners) if owner == adapter]
        answers |= dict(zip(own, _generated(peft, [prompts[row] for row in own], tokens), strict=True))
    return [answers[row] for row in range(len(owners))]


def _generated(peft: Any, prompts: Prompts, tokens: int, **more: Any) -> Answers:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = peft.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            **more,
        )
    answers: Answers = out[:, ids.shape[1] :].tolist()
    return answers


def _check(makers: dict[str, Callable[[], Answers]]) -> None:
    """Also warms everything up."""
    made = {name: make() for name, make in makers.items()}
    wrong = [name for name in ("peft_mixed", "one_after_another") if made[name] != made["engine"]]
    if wrong or made["engine_without_adapters"] == made["engine"]:
        raise SystemExit(f"the engine's tokens are not those of {', '.join(wrong) or 'its adapters'}; nothing was measured")


def _tokens_a_second(make: Callable[[], Answers]) -> float:
    began = time.perf_counter()
    answers = make()
    return sum(map(len, answers)) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
