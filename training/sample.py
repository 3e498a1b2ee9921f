"""`python -m training.sample --out FOLDER`: a base model and chat rows from the Python standard library's own documentation.

It stands in for a hub model and a team's data where there is neither: every Python carries this text. Sources are parsed, never
imported, so nothing of the library runs.
"""

import argparse
import ast
import builtins
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from hone.chat import CHATML
from hone.storage import new_folder, write_text

VOCAB_SIZE = 4096
CONTEXT = 512
PRETRAINING_STEPS = 500
PRETRAINING_BATCH = 8
PRETRAINING_LENGTH = 128
PRETRAINING_LEARNING_RATE = 4e-3
MAX_ROWS = 4000
HELD_OUT_OF = 20
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo", "pydoc_data", "__pycache__"}
QUESTIONS = ("What does {name} do?", "What is {name} for?", "Describe {name} in one sentence.", "Explain {name}.")


def make_rows(folder: Path) -> None:
    """Write train.jsonl, validation.jsonl and questions.jsonl (three of the held-out rows) into `folder`."""
    rows = [_row(name, answer) for name, answer in documented_names()]
    rows.sort(key=lambda row: _hash(row["messages"][1]["content"]))
    held_out = [row for row in rows if _hash(row["messages"][1]["content"]) % HELD_OUT_OF == 0]
    train = [row for row in rows if _hash(row["messages"][1]["content"]) % HELD_OUT_OF][:MAX_ROWS]
    questions = sorted(held_out, key=lambda row: abs(len(row["messages"][1]["content"]) - 60))[:3]
    for name, chosen in {"train": train, "validation": held_out[: MAX_ROWS // HELD_OUT_OF], "questions": questions}.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))


def make_base_model(folder: Path, *, console: Console) -> None:
    """Train a BPE tokenizer and pre-train a small Llama on the library's documentation; a folder as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    text = documentation()
    tokenizer = byte_level_tokenizer(
        text,
        vocab_size=VOCAB_SIZE,
        special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        model_max_length=CONTEXT,
    )
    tokens = torch.tensor(tokenizer("\n".join(text), add_special_tokens=False, verbose=False)["input_ids"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    pretrain(
        model,
        tokens,
        steps=PRETRAINING_STEPS,
        rows=PRETRAINING_BATCH,
        length=PRETRAINING_LENGTH,
        learning_rate=PRETRAINING_LEARNING_RATE,
        console=console,
    )
    with new_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def documented_names() -> Iterator[tuple[str, str]]:
    """(`module.name`, first sentence of its documentation), each sentence once."""
    seen: set[str] = set()
    for name, doc in [*_built_in_docs(), *_library_docs()]:
        sentence = _first_sentence(doc)
        if 20 <= len(sentence) <= 160 and sentence not in seen:
            seen.add(sentence)
            yield name, sentence


def documentation() -> list[str]:
    """All of the library's documentation, a string a piece, longest pieces (the language reference's topics) first."""
    from pydoc_data.topics import topics

    return [*topics.values(), *(inspect.cleandoc(doc) for _, doc in _library_docs())]


def _library_docs() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield from _docs_in(tree, ".".join(part for part in parts if part != "__init__"))


def _docs_in(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[tuple[str, str]]:
    doc = ast.get_docstring(node)
    if doc:
        yield name, doc
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _docs_in(child, f"{name}.{child.name}")


def _built_in_docs() -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(builtins).items()):
        if name.startswith("_") or not callable(value):
            continue
        for attribute, member in [("", value), *sorted(vars(value).items() if isinstance(value, type) else [])]:
            doc = getattr(member, "__doc__", None)
            if not attribute.startswith("_") and isinstance(doc, str):
                yield f"{name}.{attribute}".rstrip("."), doc


def _first_sentence(doc: str) -> str:
    paragraph = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)])\. ", paragraph)[0].rstrip(".")
    return f"{sentence}." if sentence[:1].isupper() else ""


def _row(name: str, answer: str) -> dict[str, Any]:
    question = QUESTIONS[_hash(name) % len(QUESTIONS)].format(name=name)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def byte_level_tokenizer(texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str], **settings: Any) -> Any:
    """A byte-level BPE tokenizer of these texts, which can encode any other.

    Args:
        texts: What its merges are learnt from.
        vocab_size: Tokens, the 256 bytes and the special ones among them.
        special_tokens: Those that no text becomes.
        settings: Of transformers' PreTrainedTokenizerFast, such as eos_token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def pretrain(model: Any, tokens: torch.Tensor, *, steps: int, rows: int, length: int, learning_rate: float, console: Console) -> float:
    """Next-token prediction on windows of a text: enough for words and indentation, far from knowledge. The last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    loss = torch.tensor(0.0)
    if not console.is_terminal:
        console.print(f"pre-training the base, {steps} steps", highlight=False)
    for _ in track(range(steps), description="pre-training the base", console=console, disable=not console.is_terminal):
        starts = torch.randint(len(tokens) - length, (rows,))
        windows = torch.stack([tokens[n : n + length] for n in starts.tolist()])
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    console.print(
        f"base model: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, loss {loss.item():.2f}", highlight=False
    )
    return loss.item()


def main(argv: list[str] | None = None) -> int:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(prog="python -m training.sample", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for base/, train.jsonl, validation.jsonl, questions.jsonl")
    parser.add_argument("--base", help="a base model to use instead of making one")
    args = parser.parse_args(argv)
    console, began = Console(), time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "questions.jsonl").exists():
        make_rows(args.out)
    if not args.base and not (args.out / "base").exists():
        make_base_model(args.out / "base", console=console)
    console.print(f"sample ready in {args.out} after {time.monotonic() - began:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
