from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from kvbench import corpora
from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task
from kvbench.toolbox.needles import DEPTHS, LINES, Hunt, documents


@dataclass(frozen=True)
class NIAH(Task):
    """Needles in a haystack: RULER's niah with key words and number values (arXiv:2404.06654), in its wording.

    Score: the share of the asked numbers that the answer contains (RULER's string_match_all). RULER's niah_single_1 is
    `haystack=noise`, _single_2 the default, _multikey_1 `needles=4 ask=1`, _multiquery `needles=4`.
    Differs from NVIDIA/RULER@c3f5e3b: `context` counts the prompt alone and is met exactly; each example's haystack
    starts at a random sentence of another document, until all were used; a quarter of the texts is left to
    calibration; no two needles share a key or a number, and their order is drawn anew for each example; sentences are
    found by a pattern, not by punkt.
    """

    score_name = "string_match_all"

    context: int = 2048  # tokens of the whole prompt: template, haystack with needles, question, answer prefix
    needles: int = 1
    ask: int = 0  # ask for this many of the needles; 0: for all
    # essays, squad, hotpotqa, a .txt file or folder, noise (RULER's five short sentences), needles (of other keys)
    haystack: str = "essays"
    # Where the needles are, in [0, 1], taken in turn, on from one example to the next. Empty: drawn as RULER does, from
    # 40 evenly spaced depths without repetition; in noise and needles, from all.
    depths: list[float] = field(default_factory=list)
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.needles < 1 or not 0 <= self.ask <= self.needles:
            raise UsageError(f"task.needles={self.needles} task.ask={self.ask}: hide at least 1, ask for at most all")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise UsageError(f"task.depths={self.depths}: a depth is from 0 (the beginning) to 1 (the end)")
        if not self.depths and self.haystack not in LINES and self.needles > len(DEPTHS):
            raise UsageError(f"task.needles={self.needles}: more than {len(DEPTHS)} need task.depths")

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """Endless. The first one takes seconds longer: the whole haystack is tokenised."""
        hunt = Hunt(
            context=self.context,
            haystack=self.haystack,
            keys=self.needles,
            ask=self.ask or self.needles,
            depths=tuple(self.depths),
            max_new_tokens=self.max_new_tokens,
        )
        if self.context < (least := hunt.least(writer)):
            raise UsageError(f"task.context={self.context} is too short for this prompt: use {least} or more")
        # The same example however many are drawn.
        return (hunt.draw(writer, f"niah-{seed}-{i:05d}", seed, i) for i in count())

    def score(self, example: Example, answer: str) -> float:
        return sum(value.lower() in answer.lower() for value in example.references) / len(example.references)

    def data_hash(self) -> str:
        return corpora.text_hash(documents(self.haystack))
