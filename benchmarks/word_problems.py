"""What benchmarks on math_word_problems share: the rows, and a small random Llama with a tokenizer made of them."""

import json
import sys
from pathlib import Path


def find_data() -> Path:
    """The training rows; without ../shared/data beside the checkout, the program ends."""
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "math_word_problems" / "train.jsonl"
    if not data.is_file():
        sys.exit("this benchmark needs ../shared/data/math_word_problems")
    return data


def conversations(data: Path) -> list[list[dict[str, str]]]:
    """The messages of each row."""
    with data.open(encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line in lines]


def make_base(folder: Path, data: Path) -> None:
    """6 layers, hidden 256, 8k tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hone.chat import CHATML
    from training.sample import byte_level_tokenizer

    fast = byte_level_tokenizer(
        [message["content"] for conversation in conversations(data) for message in conversation],
        vocab_size=8192,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=1024,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
