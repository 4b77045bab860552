"""Query heads that find what is to be repeated, and what a layer loses when only they choose: fitted once per model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvbench.artefact import Calibration, load_or_fit
from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.corpora import documents
from kvbench.measure.progress import Progress
from kvbench.plan import top_rows
from kvbench.prefill import Observed, look_ahead, read_exactly
from kvbench.toolbox.statistics import WindowAttention

if TYPE_CHECKING:
    from kvbench.cache.hf import Network
    from kvbench.model import Model

ROWS = 32  # of a layer, where its error is measured: CompressKV's smallest budget


@dataclass(frozen=True)
class SemanticHeads(Calibration):
    """Attention that each query head pays to a whole needle while the model repeats it: `heads` (layers, heads).

    The needle is the first sentence of an article of `needles`, hidden in `hay`; its article's title asks for it. The
    answer is given to the model (teacher forcing), so that small models have heads too.
    """

    hay: str = "essays"
    needles: str = "squad"
    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network = model.network
        total = torch.zeros(network.layers, network.heads, device=network.device)
        runs = list(itertools.product(self.lengths, self.depths))
        articles = itertools.cycle(documents(self.needles, "calibration"))
        texts = itertools.cycle(documents(self.hay, "calibration"))
        with torch.inference_mode(), Progress(f"finding retrieval heads of {model.config.name}", len(runs)) as bar:
            for (length, depth), article, text in zip(runs, articles, texts, strict=False):
                ids, span, answer = _hide(model, article, text, length, depth)
                total += needle_attention(network, ids, span, answer)
                bar.advance()
        return {"heads": total / len(runs)}, {"runs": len(runs)}


def _hide(model: Model, article: str, text: str, length: int, depth: float) -> tuple[Tensor, tuple[int, int], Tensor]:
    """(prompt, where the needle is in it, the needle as the answer) of one run."""
    title, _, body = article.partition("\n")
    needle = body.strip().partition(". ")[0] + "."
    writer = model.writer
    hay, sentence, line = writer.encode(text[: 16 * length])[:length], writer.encode(needle), writer.encode("\n")
    cut = int(depth * len(hay))
    prompt = writer.prompt(
        hay[:cut] + line + sentence + line + hay[cut:],
        f"\nOne sentence of this text is about {title}. Repeat it word by word.",
    )
    start = len(prompt.context) - (len(hay) - cut) - len(line) - len(sentence)
    ids = prompt.context + prompt.question + prompt.tail
    device = model.network.device
    return torch.tensor(ids, device=device), (start, start + len(sentence)), torch.tensor(sentence, device=device)


def needle_attention(
    network: Network, ids: Int[Tensor, " tokens"], span: tuple[int, int], answer: Int[Tensor, " new"]
) -> Float[Tensor, "layers heads"]:
    """Mean attention into the span of the queries that answer: the prompt's last one, and the answer's but its last."""

    def observe(ahead: Observed) -> Float[Tensor, " heads"]:
        mask = causal_mask(ahead.query.shape[1], ahead.total, ahead.query.device)
        return attention_weights(ahead.query, ahead.key, ahead.scale, mask)[..., span[0] : span[1]].sum(-1).mean(1)

    found = look_ahead(read_exactly(network, ids[:-1]), torch.cat([ids[-1:], answer[:-1]]), observe=observe)
    return torch.stack(network.gather(found))


def best_heads(scores: Float[Tensor, "layers heads"], share: float) -> Int[Tensor, "layers chosen"]:
    """The best query heads of each layer: a share of them, one at least."""
    return scores.topk(max(round(share * scores.shape[1]), 1), dim=1).indices


def heads_scores(
    attention: Float[Tensor, "heads tokens"], chosen: Int[Tensor, " chosen"], window: int, pool: int
) -> Float[Tensor, " tokens"]:
    """Some heads' mean window attention, average-pooled over neighbours; the window is pooled on its own."""
    before = max(attention.shape[1] - window, 0)
    mean = attention[chosen.to(attention.device)].mean(0, keepdim=True)
    parts = [part for part in mean.tensor_split([before], dim=1) if part.shape[1]]
    return torch.cat([avg_pool1d(p, pool, 1, pool // 2, count_include_pad=False) for p in parts], 1)[0]


@dataclass(frozen=True)
class LayerErrors(Calibration):
    """How far a layer's output moves if it holds 32 tokens chosen by its retrieval heads: `errors` (layers), sum 1.

    Relative to the output's norm, over `steps` tokens that go on after `tokens` of a text; each layer sees the exact
    model's input, so errors don't add up over layers. Normalised within each of `texts`, then averaged.
    """

    share: float
    window: int
    pool: int
    texts: tuple[str, ...] = ("essays", "squad")
    sequences: int = 4  # of each text
    tokens: int = 1024
    steps: int = 64

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network = model.network
        heads = best_heads(load_or_fit(SemanticHeads(), model).tensors["heads"], self.share)
        errors = []
        count = len(self.texts) * self.sequences
        with torch.inference_mode(), Progress(f"measuring layers of {model.config.name}", count) as bar:
            for source in self.texts:
                total = torch.zeros(network.layers, device=network.device)
                for ids in itertools.islice(self._sequences(model, source), self.sequences):
                    total += self._errors(network, ids, heads)
                    bar.advance()
                errors.append(total / total.sum())
        return {"errors": torch.stack(errors).mean(0)}, {}

    def _sequences(self, model: Model, source: str) -> Iterator[Tensor]:
        """Beginnings of documents; a long document gives one, a short one none."""
        length = self.tokens + self.steps
        for document in documents(source, "calibration"):
            ids = model.writer.head[:1] + model.writer.encode(document[: 16 * length])
            if len(ids) >= length:
                yield torch.tensor(ids[:length], device=model.network.device)

    def _errors(
        self, network: Network, ids: Int[Tensor, " tokens"], heads: Int[Tensor, "layers chosen"]
    ) -> Float[Tensor, " layers"]:
        need = WindowAttention(self.window)
        seen = read_exactly(network, ids[: self.tokens], {need})
        scores = [
            heads_scores(attention, chosen, self.window, self.pool)
            for attention, chosen in zip(seen.statistics[need], heads, strict=True)
        ]
        kept = [top_rows(s[None], ROWS, (0, self.window))[0] == 0 for s in scores]
        errors = look_ahead(seen, ids[self.tokens :], observe=partial(output_error, network, kept))
        return torch.stack(network.gather(errors))


def output_error(network: Network, kept: list[Bool[Tensor, " tokens"]], ahead: Observed) -> Float[Tensor, ""]:
    """Sum over the new tokens of |O - O'| / |O|: what a layer adds, reading everything and reading `kept` alone."""
    new = ahead.query.shape[1]
    mask = causal_mask(new, ahead.total, ahead.query.device)
    few = mask & torch.nn.functional.pad(kept[ahead.layer], (0, new), value=True)
    value = ahead.value.float().repeat_interleave(len(ahead.query) // len(ahead.value), 0)
    projection = network.output_projection(ahead.layer).float()
    full, part = (
        (attention_weights(ahead.query, ahead.key, ahead.scale, m) @ value @ projection).sum(0) for m in (mask, few)
    )
    return ((full - part).norm(dim=-1) / (full.norm(dim=-1) + 1e-5)).sum()


def layer_rows(errors: Sequence[float], rows: int, tokens: int) -> list[int]:
    """Rows of each layer, by its share of the errors: at least 32 and at most three times the mean, `tokens` at most.

    With less than 32 each, equal. What rounding and those bounds leave over or lack goes to the layers in order of
    error, one row at a time.
    """
    layers = len(errors)
    mean = rows // layers
    least, most = min(ROWS, mean), min(3 * mean, tokens)
    spare = rows - layers * least
    found = [min(max(least + round(e * spare), least), most) for e in errors]
    order = sorted(range(layers), key=lambda layer: -errors[layer])
    missing = min(rows, layers * most) - sum(found)
    step = 1 if missing > 0 else -1
    while missing:
        for layer in order:
            if missing and least <= found[layer] + step <= most:
                found[layer] += step
                missing -= step
    return found
