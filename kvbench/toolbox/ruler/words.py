"""Common words, cwe, and frequent words, fwe."""

from __future__ import annotations

import functools
import itertools
import math
import random
import string
from typing import NamedTuple

import numpy as np

from kvbench.prompt import Writer
from kvbench.task import Context
from kvbench.toolbox.needles import word_pairs, wordlist
from kvbench.toolbox.ruler.shared import Wording, fit, make_context, new_tokens, numbered, target, token_count

_COMMON = 10  # words that cwe asks for
_LEAST_UNCOMMON = 10
_FWE_LEAST = 27  # words: with fewer, there is no third one
_CWE = Wording(
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
_FWE = Wording(
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words.",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)


# Common words


@functools.cache
def cwe_words() -> tuple[str, ...]:
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in wordlist(kind)}))


class _Times(NamedTuple):
    """How often words stand in cwe's list, and in its solved example."""

    common: int
    uncommon: int
    solved_words: int
    solved_common: int
    solved_uncommon: int


_MANY, _FEW = _Times(30, 3, 40, 10, 3), _Times(6, 1, 20, 3, 1)


def _cwe_solved(words: list[str], times: _Times, draw: random.Random) -> str:
    listed = words[:_COMMON] * times.solved_common + words[_COMMON:] * times.solved_uncommon
    draw.shuffle(listed)
    return _CWE.intro + numbered(listed) + _CWE.question + _CWE.prefix + target("cwe", words[:_COMMON]) + "\n"


def cwe(name: str, context: int, writer: Writer) -> Context:
    draw = random.Random(name)
    # RULER decides by the length with the answer. Where a token is less than half a word, many do not fit.
    many = context + new_tokens("cwe") >= 4096 and context >= cwe_least(writer, _MANY)
    times = _MANY if many else _FEW
    room = context - writer.overhead(_CWE.question, _CWE.prefix)
    fitted = None
    while fitted is None:  # a draw of long words may not fit into the shortest prompts
        head = _cwe_solved(draw.sample(cwe_words(), times.solved_words), times, draw) + _CWE.intro
        left = room - len(writer.encode(head))
        words = draw.sample(cwe_words(), len(cwe_words()))
        sizes = _cwe_sizes(writer, words, times)
        if sizes[-1] <= left:  # above 120,000 tokens or so
            words += itertools.islice(word_pairs(draw, set(words)), left // (4 * times.uncommon))
            sizes = _cwe_sizes(writer, words, times)
        text = functools.partial(_cwe_text, name, head, words, times)
        guess = int(np.searchsorted(sizes, left, side="right"))
        fitted = fit(writer, text, guess, _LEAST_UNCOMMON, len(words) - _COMMON, room)
    return make_context(name, fitted[1], _CWE.question, _CWE.prefix, words[:_COMMON], context)


def _cwe_text(name: str, head: str, words: list[str], times: _Times, uncommon: int) -> str:
    listed = words[:_COMMON] * times.common + words[_COMMON : _COMMON + uncommon] * times.uncommon
    random.Random(f"{name}-{uncommon}").shuffle(listed)
    return head + numbered(listed)


def _cwe_sizes(writer: Writer, words: list[str], times: _Times) -> np.ndarray:
    """Tokens of a list with 1, 2, ... uncommon words."""
    lengths = [token_count(writer, " " + word) for word in words]
    listed = times.common * _COMMON + times.uncommon * np.arange(1, len(words) - _COMMON + 1)
    sizes = times.common * sum(lengths[:_COMMON]) + times.uncommon * np.cumsum(lengths[_COMMON:])
    return sizes + _numbers(writer, int(listed[-1]))[listed - 1]


@functools.lru_cache(maxsize=4)
def cwe_least(writer: Writer, times: _Times = _FEW) -> int:
    """Tokens that most draws need; `cwe` passes over the others."""
    words = sorted(cwe_words(), key=lambda word: token_count(writer, " " + word))
    usual = words[len(words) * 3 // 4]
    head = _cwe_solved([usual] * times.solved_words, times, random.Random()) + _CWE.intro
    text = _cwe_text("", head, [usual] * (_COMMON + _LEAST_UNCOMMON), times, _LEAST_UNCOMMON)
    return writer.overhead(_CWE.question, _CWE.prefix) + len(writer.encode(text))


@functools.lru_cache(maxsize=4)
def _numbers(writer: Writer, most: int) -> np.ndarray:
    """Tokens of the first 1, 2, ..., `most` numbers of a list."""
    return np.cumsum([len(ids) for ids in writer.encode_all([f" {number}." for number in range(1, most + 1)])])


# Frequent words


def _fwe_counts(number: int, ranks: np.ndarray) -> np.ndarray:
    """How often words of these ranks stand among `number` words: Zipf's law with exponent 2."""
    return (number / ranks**2 / (math.pi**2 / 6)).astype(int)


def fwe(name: str, context: int, writer: Writer) -> Context:
    draw = random.Random(name)
    vocabulary = ["..."]
    while len(vocabulary) < max(5, context // 50):
        new = "".join(draw.choices(string.ascii_lowercase, k=6))
        vocabulary += [new] if new not in vocabulary else []
    intro = writer.encode(_FWE.intro)
    room = context - writer.overhead(_FWE.question, _FWE.prefix) - len(intro)
    tokens = writer.encode_all([" " + word for word in vocabulary])
    lengths, ranks = np.array([len(ids) for ids in tokens]), np.arange(1, len(vocabulary) + 1)

    def fits(number: int) -> bool:
        return bool(_fwe_counts(number, ranks) @ lengths <= room)

    number, above = _FWE_LEAST, 2 * room + 2 * _FWE_LEAST
    while above - number > 1:
        middle = (number + above) // 2
        number, above = (middle, above) if fits(middle) else (number, middle)
    # Fewer as long as the third to be found is no more frequent than others.
    while (counts := _fwe_counts(number, ranks))[3] == counts[4]:
        number -= 1
    # Filled up with the noise word; the last one is cut.
    counts[0] += -(-(room - counts @ lengths) // lengths[0])
    listed = [ids for ids, times in zip(tokens, counts, strict=True) for _ in range(times)][1:]
    draw.shuffle(listed)
    ids = list(itertools.chain(intro, *listed, tokens[0]))[: len(intro) + room]
    return make_context(name, ids, _FWE.question, _FWE.prefix, vocabulary[1:4], context)


def fwe_least(writer: Writer) -> int:
    noise, *others = _fwe_counts(_FWE_LEAST, np.arange(1, 6))
    words = noise * len(writer.encode(" ...")) + sum(others) * len(" qxzjvk")  # a letter is a token at most
    return writer.overhead(_FWE.question, _FWE.prefix) + len(writer.encode(_FWE.intro)) + int(words)
