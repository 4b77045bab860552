"""How free answers are scored: LongBench's metrics (arXiv:2308.14508), each in [0, 1].

Numbers are those of THUDM/LongBench@2e00731's metrics.py with the packages it requires, but for one case: the package
`rouge` overruns Python's stack on sentences of about a thousand words, which counts 0 there and is scored here.
"""

from __future__ import annotations

import difflib
import functools
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from kvbench.errors import UsageError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_PUNCTUATION_ZH = str.maketrans("", "", string.punctuation + _CHINESE)


def first_line(answer: str) -> str:
    """The answer up to its first line end, those before it aside."""
    return answer.lstrip("\n").partition("\n")[0]


def f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of words."""
    same = sum((Counter(answer) & Counter(reference)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(answer: str, reference: str) -> float:
    """F1 of the words, after SQuAD's normalisation: lower case, no punctuation, no articles."""

    def words(text: str) -> list[str]:
        return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()

    return f1(words(answer), words(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """F1 of the Chinese words, without punctuation."""

    def words(text: str) -> list[str]:
        pieces = ("".join(piece.lower().translate(_PUNCTUATION_ZH).split()) for piece in segmenter()(text))
        return [piece for piece in pieces if piece]

    return f1(words(answer), words(reference))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L as the package `rouge` 1.0.1 has it: F of the *distinct* words in the longest common subsequences.

    Sentences end at full stops; each of the reference is matched with each of the answer.
    """

    def sentences(text: str) -> list[list[str]]:
        return [" ".join(part.split()).split(" ") for part in text.split(".") if part]

    mine, theirs = sentences(answer), sentences(reference)
    if not mine or not theirs:
        return 0.0
    common = {word for sentence in theirs for other in mine for word in _common_subsequence(sentence, other)}
    precision = len(common) / len({word for sentence in mine for word in sentence})
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(answer: str, reference: str) -> float:
    """ROUGE-L of the Chinese words."""
    return rouge_l(" ".join(segmenter()(answer)), " ".join(segmenter()(reference)))


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The longest common subsequence; of several, the one that drops words of `second` first, from the end."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        above, row = lengths[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append(first[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def number_share(answer: str, reference: str) -> float:
    """The share of the answer's integers that are the reference's: of a count, or of "Paragraph 7"."""
    numbers, (right, *_) = re.findall(r"\d+", answer), re.findall(r"\d+", reference)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the answer names, if the right one is among them.

    A class whose name is part of the right one's does not count, but the one after it is never looked at: the authors'
    list shrinks while they go through it.
    """
    named = [name for name in classes if name in answer]
    position = 0
    while position < len(named):
        if named[position] != reference and named[position] in reference:
            del named[position]
        position += 1
    return 1 / len(named) if reference in named else 0.0


def edit_similarity(answer: str, reference: str) -> float:
    """Similarity, in whole percent, of the reference and the answer's first line without a comment or a back-tick.

    That of difflib, which fuzzywuzzy.ratio takes without the package python-Levenshtein.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not reference:
        return float(line == reference)
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


@functools.cache
def segmenter() -> Callable[[str], list[str]]:
    """Cuts Chinese text into words. Raises UsageError without the package jieba."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age: escapes and pkg_resources
        try:
            import jieba
        except ImportError as error:
            raise UsageError("Chinese answers are scored word by word: pip install kvbench[zh]") from error
    jieba.setLogLevel("WARNING")
    return jieba.lcut
