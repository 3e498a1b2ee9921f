"""Texts with words left out, exchanged, or written in another case, in the way of EDA (https://arxiv.org/abs/1901.11196).

For rows whose answer is not the text itself: a class stays what it is if a word is missing.
"""

import re

import numpy as np

CASES = (str.upper, str.lower, str.capitalize)


def augment_text(text: str, rng: np.random.Generator, *, word_dropout: float, word_swap: float, case_noise: float) -> str:
    """The text with some of its words changed; blanks and line ends between those that stay, and around them all, are kept.

    Args:
        text: Words are what blanks part; a text without blanks (Chinese, say) is one word.
        rng: What is drawn from.
        word_dropout: Probability that a word is left out, with the blanks before it. One word is always kept.
        word_swap: Probability that a word changes places with the next, from left to right; no word is moved twice.
        case_noise: Probability that a word is written in another case: all large, all small, or with a large first letter.
    """
    pieces = re.split(r"(\S+)", text)  # blanks, word, blanks, word, ..., blanks
    blanks, words = pieces[::2], pieces[1::2]
    if not words:
        return text
    words = _swapped(words, rng, word_swap)
    kept = _kept(len(words), rng, word_dropout)
    cased = [_recased(words[n], rng) if draw < case_noise else words[n] for n, draw in zip(kept, rng.random(len(kept)), strict=True)]
    before = [blanks[0], *(blanks[n] for n in kept[1:])]
    return "".join(blank + word for blank, word in zip(before, cased, strict=True)) + blanks[-1]


def _swapped(words: list[str], rng: np.random.Generator, probability: float) -> list[str]:
    words, n = list(words), 0
    draws = rng.random(len(words))
    while n + 1 < len(words):
        if draws[n] < probability:
            words[n], words[n + 1] = words[n + 1], words[n]
            n += 1
        n += 1
    return words


def _kept(n_words: int, rng: np.random.Generator, dropout: float) -> list[int]:
    """Which words stay, at least one."""
    kept = np.flatnonzero(rng.random(n_words) >= dropout)
    return kept.tolist() if len(kept) else [int(rng.integers(n_words))]


def _recased(word: str, rng: np.random.Generator) -> str:
    """In a case that it is not in already; a number stays what it is."""
    others = sorted({case(word) for case in CASES} - {word})
    return others[int(rng.integers(len(others)))] if others else word
