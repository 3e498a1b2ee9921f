"""Grammars compiled for a tokenizer, by llguidance (the extra `hone[grammar]`), and kept for the next request that has the same.

Compiling takes from a millisecond to seconds and happens in the thread of the request that asks for it, never in the model's; llguidance
lets go of the interpreter's lock meanwhile. Each answer then begins with a copy of what was compiled, which costs a microsecond.
docs/decisions/0018 says why llguidance.
"""

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from serving.base import Served
from serving.engine.constraint import Constraint
from serving.errors import RequestError

EXTRA = "hone[grammar]"
GRAMMARS = 128
"""Compiled ones that are kept; each takes some ten kilobytes, up to a few megabytes."""
TOKENIZERS = 4
"""That are kept; one of 150,000 tokens takes some 30 MB."""
UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*)\]")

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A JSON schema in a grammar."""

    name: str
    schema: dict[str, Any]
    param: str
    """Where in the request it stands."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must be written as."""

    param: str
    """What of the request asks for it."""
    parts: Sequence[Part]
    rules: str = ""
    """In llguidance's variant of Lark's syntax; they name the parts as rules. The first is `answer`; none are the one part by itself."""

    def text(self, *, ends: Collection[int] = ()) -> str:
        """All of it in that syntax. The order of a schema's keys counts: it is the order in which an answer has them.

        Args:
            ends: Tokens that may end an answer, for who compiles it with a tokenizer that does not know them.
        """
        start = "start: answer" if self.rules else f"start: {self.parts[0].name}"
        ended = f" ended?\nended: {' | '.join(f'<[{token}]>' for token in sorted(ends))}" if ends else ""
        return f"%llguidance {{}}\n{start}{ended}\n{self._named}"

    @cached_property
    def _named(self) -> str:
        """The rules, and the parts as rules."""
        schemas = (f"{part.name}: %json {json.dumps(part.schema)}" for part in self.parts)
        return "\n".join([*([self.rules] if self.rules else []), *schemas, ""])


class Grammars:
    """Of one base and its adapters. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        """Of tokenizers, which many adapters share."""
        self._tokenizers: Kept[str, Any] = Kept(TOKENIZERS)
        self._compiled: Kept[str, Any] = Kept(GRAMMARS)

    def constraints(self, served: Served, grammar: Grammar, count: int) -> list[Constraint]:
        """The grammar's beginning, for so many answers.

        Raises:
            RequestError: llguidance is not installed, or does not take the grammar.
        """
        compiled = self._find(served, grammar)
        text = grammar.text(ends=served.end_ids - {served.processor.eos_token_id})
        return [Constraint(compiled.deep_copy(), text) for _ in range(count)]

    def _find(self, served: Served, grammar: Grammar) -> Any:
        try:
            import llguidance
        except ImportError:
            raise RequestError(
                f"{grammar.param} needs a grammar library, which this server lacks; install it with: pip install '{EXTRA}'",
                grammar.param,
                "unsupported_parameter",
            ) from None
        tokenizer, digest = self._tokenizer(served)
        text = grammar.text()
        key = _digest(digest, text)
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            compiled = _matcher(llguidance, tokenizer, text)
            if compiled.is_error():
                raise _refusal(llguidance, tokenizer, grammar, compiled.get_error())
            with self._lock:
                self._compiled.put(key, compiled)
        return compiled

    def _tokenizer(self, served: Served) -> tuple[Any, str]:
        """The tokenizer as llguidance has it, and its digest."""
        import llguidance.hf

        with self._lock:  # held while one is made: it takes seconds and memory, and all who wait want the same
            own = self._digests.get(served.processor)
            if own is None:
                if not getattr(served.processor, "is_fast", False):
                    raise RequestError(f"{served.name} has a tokenizer written in Python, of which no grammar can be followed", "model")
                own = self._digests[served.processor] = _digest(served.processor.backend_tokenizer.to_str())
            key = _digest(own, *map(str, sorted(served.end_ids)))
            made = self._tokenizers.get(key)
            if made is None:
                made = llguidance.hf.from_tokenizer(served.processor, eos_token=sorted(served.end_ids))
                self._tokenizers.put(key, made)
            return made, key


def _matcher(llguidance: Any, tokenizer: Any, text: str) -> Any:
    return llguidance.LLMatcher(tokenizer, llguidance.grammar_from("lark", text), log_level=0)


def _refusal(llguidance: Any, tokenizer: Any, grammar: Grammar, error: str) -> RequestError:
    """Which schema is at fault, and what in it."""
    for part in grammar.parts:
        alone = _matcher(llguidance, tokenizer, Grammar(part.param, [part]).text())
        if alone.is_error():
            return RequestError(f"{part.param}: {_said(alone.get_error())}", part.param)
    return RequestError(f"{grammar.param}: {_said(error)}", grammar.param)


def _said(error: str) -> str:
    """llguidance's message in ours."""
    message = error.strip()[:500]
    if match := UNIMPLEMENTED.search(message):
        keys = ", ".join(match[1].replace('"', "").split(", "))
        return f"the schema's {keys} cannot be enforced; leave it out"
    return f"the schema cannot be followed ({message})"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


K = TypeVar("K")


class Kept(Generic[K, T]):
    """The values that were used last, so many of them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[K, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> T | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: T) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > self._capacity:
            self._values.popitem(last=False)
