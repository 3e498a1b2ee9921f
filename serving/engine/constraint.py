"""What an answer may be written as: which tokens may come next, given those that are written.

The engine knows no grammar library: whoever compiles a grammar (`serving.grammar`) hands over a matcher for each answer.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Matcher(Protocol):
    """Of llguidance's LLMatcher, what is used. It raises nothing: one that has failed says so."""

    def compute_bitmask(self) -> bytes: ...

    def consume_token(self, token: int, /) -> bool: ...

    def is_stopped(self) -> bool: ...

    def get_error(self) -> str: ...


class Constraint:
    """A grammar, at where one answer is in it."""

    def __init__(self, matcher: Matcher, grammar: str = "") -> None:
        """`grammar` is what the matcher was compiled from, in llguidance's variant of Lark's syntax, for engines that compile it too."""
        self.grammar = grammar
        self._matcher = matcher

    @property
    def error(self) -> str:
        """Why no token can be chosen any more; empty where one can."""
        return self._matcher.get_error()

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped() and not self.error

    def allowed(self, vocabulary: int) -> Tensor:
        """Which of so many tokens may come next [vocabulary]: none where it has failed, and never those that only the embedding has."""
        mask = self._matcher.compute_bitmask()
        if self.error:
            return torch.zeros(vocabulary, dtype=torch.bool)
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:vocabulary]
        return torch.from_numpy(np.pad(bits, (0, vocabulary - len(bits)))).bool()

    def take(self, token: int) -> bool:
        """Go on by a token; whether it may come here."""
        return self._matcher.consume_token(token)
