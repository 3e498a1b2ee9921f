"""The base's tokenizer, with a pad token and a chat template in any case."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from hone.chat import ensure_template
from hone.errors import BaseModelError

NO_TEMPLATE = "the base has no chat template, so ChatML is used"


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer, with a pad token and a chat template in any case.

    Raises:
        BaseModelError: there is none, or it is none of the tokenizers library, so it does not say which characters a token is of.
    """
    return _loaded(folder)[0]


def lacks_template(folder: Path) -> bool:
    """Whether the base has no chat template of its own, so that its tokenizer was given ChatML."""
    return _loaded(folder)[1]


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> tuple[Any, bool]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise BaseModelError(
            f"{folder}: {kind} is written in Python and does not locate its tokens; add a tokenizer.json (a fast tokenizer)"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, ensure_template(tokenizer)
