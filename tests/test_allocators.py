"""Who gets how many rows: the allocators against their papers' formulas written out with loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_methods
import torch
from conftest import ids_of, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvbench import plugins
from kvbench.artefact import Artefact
from kvbench.budget import Allowance, Budget
from kvbench.cache.fork import Fork
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import EVICTED, LayerPlan, Plan, keep_all
from kvbench.prefill import Observed, Seen, SeenLayer, look_ahead, read_exactly
from kvbench.toolbox.allocation import retrieval_shares, share_out
from kvbench.toolbox.head_maps import CopyingHeads, RecallingHeads, copying, copying_order, streaming_error
from kvbench.toolbox.statistics import WindowMoments

TOKENS, LAYERS, KV_HEADS, GROUP = 90, 4, 2, 2
NETWORK = tiny_network(num_hidden_layers=LAYERS)
WINDOW = {"base": "snapkv", "base_options": {"window": 8, "pool": 3}}


@torch.inference_mode()
def see(method: Method, tokens: int = TOKENS, chunk: int = 65536) -> Seen:
    return read_exactly(NETWORK, ids_of(NETWORK, tokens), method.needs, "c", chunk)


def plan(method: Method, seen: Seen, tokens: int) -> Plan:
    """The plan for `tokens` per KV head, nominally."""
    return method.plan(seen, Budget.parse(f"{tokens}tok").allow(NETWORK.row_bytes() * TOKENS, TOKENS))


def kept(method: Method, seen: Seen, tokens: int) -> list[list[list[int]]]:
    """The tokens each KV head of each layer keeps."""
    return [[row.nonzero()[:, 0].tolist() for row in x.route == 0] for x in plan(method, seen, tokens).layers]


@cache
def matrices(tokens: int = TOKENS) -> list[Tensor]:
    """Stock transformers' attention matrices, (heads, tokens, tokens) per layer."""
    config: Any = copy.deepcopy(NETWORK._model.config)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    stock.load_state_dict(NETWORK._model.state_dict())
    with torch.inference_mode():
        return [m[0].double() for m in stock(ids_of(NETWORK, tokens)[None], output_attentions=True).attentions]


def pooled(row: list[float], pool: int) -> list[float]:
    """The mean of each place and its neighbours."""
    near = [row[max(t - pool // 2, 0) : t + pool // 2 + 1] for t in range(len(row))]
    return [sum(x) / len(x) for x in near]


def snapkv_scores(layer: int, window: int = 8, pool: int = 3) -> list[list[float]]:
    rows = matrices()[layer][:, -window:].mean(1).unflatten(0, (KV_HEADS, -1)).mean(1)
    return [pooled(row, pool) for row in rows.tolist()]


def whole(ideal: Sequence[Fraction], total: int) -> list[int]:
    """Largest remainder, the first of equal ones."""
    counts = [math.floor(x) for x in ideal]
    order = sorted(range(len(ideal)), key=lambda i: (counts[i] - ideal[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def best(scores: list[float], keep: int, first: int, last: int) -> list[int]:
    """The first and last tokens, and the best `keep` between them."""
    middle = range(first, len(scores) - last)
    top = sorted(middle, key=lambda t: -scores[t])[:keep]
    return sorted([*range(first), *top, *range(len(scores) - last, len(scores))])


# -- PyramidKV ---------------------------------------------------------------------------------------------------------


def pyramid(total: int, window: int, beta: int) -> list[int]:
    mean = Fraction(total, LAYERS) - window
    low = mean / beta
    high = 2 * mean - low
    if high > TOKENS - window:
        high, low = Fraction(TOKENS - window), 2 * mean - (TOKENS - window)
    return whole(
        [high - Fraction(layer, LAYERS - 1) * (high - low) for layer in range(LAYERS)], total - LAYERS * window
    )


@pytest.mark.parametrize("beta", [1, 2, 20])
@pytest.mark.parametrize("tokens", [17, 30, 45, 60, 80])
def test_pyramidkv_keeps_what_its_slope_says(tokens: int, beta: int) -> None:
    method = plugins.build_method("pyramidkv", beta=beta, **WINDOW)
    found = kept(method, see(method), tokens)
    for layer, keep in enumerate(pyramid(LAYERS * tokens, 8, beta)):
        assert found[layer] == [best(s, keep, 0, 8) for s in snapkv_scores(layer)]
    counts = [len(heads[0]) for heads in found]
    assert sum(counts) == LAYERS * tokens
    assert counts == sorted(counts, reverse=True)
    assert (counts[0] == counts[-1]) == (beta == 1)


def test_pyramidkv_with_beta_1_is_its_base() -> None:
    base = plugins.build_method("snapkv", **WINDOW["base_options"])  # type: ignore[arg-type]
    method = plugins.build_method("pyramidkv", beta=1, **WINDOW)
    assert kept(method, see(method), 40) == kept(base, see(base), 40)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 40), st.integers(1, 300), st.data(), st.floats(1, 1000))
def test_pyramidkv_never_rises_and_keeps_its_total(layers: int, tokens: int, data: st.DataObject, beta: float) -> None:
    method = plugins.build_method("pyramidkv", beta=beta)
    rows = data.draw(st.integers(layers, layers * tokens))
    counts = method.allocate(fake(layers, 1, tokens), [torch.rand(1, tokens)] * layers, rows)[:, 0]
    assert int(counts.sum()) == rows
    assert (counts.diff() <= 0).all()


# -- Ada-KV ------------------------------------------------------------------------------------------------------------


def ada(scores: list[list[float]], total: int, window: int, alpha: Fraction) -> list[int]:
    pool = total - KV_HEADS * window
    flat = sorted((-x, g, t) for g, row in enumerate(scores) for t, x in enumerate(row[: TOKENS - window]))
    won = [sum(g == head for _, g, _ in flat[:pool]) for head in range(KV_HEADS)]
    return whole([(1 - alpha) * c + alpha * Fraction(pool, KV_HEADS) for c in won], pool)


@pytest.mark.parametrize("alpha", ["0", "0.2", "0.5", "1"])
@pytest.mark.parametrize("tokens", [16, 20, 33, 60, 85])
def test_adakv_keeps_what_the_competition_gives_each_head(tokens: int, alpha: str) -> None:
    method = plugins.build_method("adakv", alpha=float(alpha), **WINDOW)
    found = kept(method, see(method), tokens)
    uneven = 0
    for layer in range(LAYERS):
        scores = snapkv_scores(layer)
        counts = ada(scores, KV_HEADS * tokens, 8, Fraction(alpha))
        assert found[layer] == [best(s, c, 0, 8) for s, c in zip(scores, counts, strict=True)]
        assert sum(counts) == KV_HEADS * (tokens - 8)
        assert min(counts) >= math.floor(Fraction(alpha) * (tokens - 8))
        uneven += len(set(counts)) > 1
    assert bool(uneven) == (alpha != "1")


def test_adakv_over_pyramidkv_keeps_the_pyramids_layers() -> None:
    """The paper's Ada-Pyramid."""
    options = {"base": "pyramidkv", "base_options": {"beta": 4, **WINDOW}}
    found = kept(method := plugins.build_method("adakv", **options), see(method), 30)
    for layer, mean in enumerate(pyramid(LAYERS * 30, 8, 4)):
        scores = snapkv_scores(layer)
        counts = ada(scores, KV_HEADS * (mean + 8), 8, Fraction("0.2"))
        assert found[layer] == [best(s, c, 0, 8) for s, c in zip(scores, counts, strict=True)]


def test_adakv_shares_equally_among_equals() -> None:
    method = plugins.build_method("adakv", **WINDOW)
    scores = [torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(i)).expand(3, -1) for i in range(2)]
    assert (method.allocate(fake(2, 3, TOKENS), scores, 6 * 40) == 40).all()


def test_adakv_gives_a_focused_head_less() -> None:
    """A head with all its mass on a few tokens needs few rows."""
    method = plugins.build_method("adakv", **WINDOW)
    focused = torch.full((TOKENS,), 1e-6)
    focused[10:15] = 0.2
    counts = method.allocate(fake(1, 2, TOKENS), [torch.stack([focused, torch.full((TOKENS,), 1 / TOKENS)])], 2 * 40)
    assert counts.tolist() == [[8 + 10, 80 - 18]]  # 0.8 x 5 + 0.2 x 32 = 10.4 and its window


def test_adakv_compares_ranks_by_their_softmax() -> None:
    """Key norms don't compare over heads: were they compared, the head with small ones would win everything."""
    method = plugins.build_method("adakv", base="knorm")
    draw = torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(0))
    counts = method.allocate(fake(1, 2, TOKENS), [torch.cat([draw, draw - 100])], 80)
    assert counts.tolist() == [[40, 40]]


def test_a_ragged_cache_holds_no_more_than_its_rows() -> None:
    """Bytes: the rows, and where heads differ four for each head's count."""
    method = plugins.build_method("adakv", **WINDOW)
    seen = see(method)
    made = plan(method, seen, 30)
    packed = CompressedCache.pack(made, seen)
    counts = [slab.layout.counts for layer in packed.layers for slab in layer.slabs]
    ragged = sum(len(set(c)) > 1 for c in counts)
    assert ragged
    assert packed.nbytes == sum(map(sum, counts)) * 2 * NETWORK.dim * 4 + ragged * KV_HEADS * 4


# -- PrefixKV ----------------------------------------------------------------------------------------------------------


def bisect_prefix(scores: list[list[float]], total: int, first: int, last: int) -> list[int]:
    """Rows of each layer between the protected ones, by bisection on the share of attention that all layers keep."""

    def needed(row: list[float], share: float) -> int:
        middle = sorted(row[first : len(row) - last], reverse=True)
        held = sum(row) - sum(middle)
        for count, x in enumerate([*middle, 0.0]):
            if held >= share * sum(row):
                return count
            held += x
        return len(middle)

    low, high = 0.0, 1.0
    for _ in range(100):
        share = (low + high) / 2
        if sum(needed(row, share) + first + last for row in scores) > total:
            high = share
        else:
            low = share
    return [needed(row, low) for row in scores]


@pytest.mark.parametrize(("sinks", "recent"), [(1, 1), (3, 5), (0, 0)])
@pytest.mark.parametrize("tokens", [16, 25, 50, 75])
def test_prefixkv_keeps_the_same_share_of_attention_in_all_layers(tokens: int, sinks: int, recent: int) -> None:
    method = plugins.build_method("prefixkv", sinks=sinks, recent=recent)
    found = kept(method, see(method), tokens)
    scores = [m.mean(0).sum(0).tolist() for m in matrices()]  # the attention of all queries, all heads
    counts = bisect_prefix(scores, LAYERS * tokens, sinks, recent)
    assert sum(counts) + LAYERS * (sinks + recent) == LAYERS * tokens
    assert len(set(counts)) > 1
    for heads, row, count in zip(found, scores, counts, strict=True):
        assert heads == [best(row, count, sinks, recent)] * KV_HEADS


def test_prefixkv_shares_equally_among_equal_layers() -> None:
    method = plugins.build_method("prefixkv")
    scores = [torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(0))] * 5
    assert (method.allocate(fake(5, 2, TOKENS), scores, 10 * 30) == 30).all()
    assert sorted(method.allocate(fake(5, 2, TOKENS), scores, 10 * 30 + 4)[:, 0].tolist()) == [30, 30, 30, 31, 31]


# -- CAKE --------------------------------------------------------------------------------------------------------------


def cake_parts(layer: int, window: int) -> Tensor:
    """The window's queries over the tokens before it: (heads, window, tokens - window)."""
    return matrices()[layer][:, -window:, :-window]


def cake_scores(layer: int, window: int, gamma: float) -> list[list[float]]:
    part = cake_parts(layer, window)
    mean = part.sum(1) / window
    variance = ((part - mean[:, None]) ** 2).sum(1) / (window - 1)
    heads = [pooled(row, 5) for row in (mean + gamma * variance).tolist()]
    return [
        [sum(x) / GROUP for x in zip(*heads[g * GROUP : (g + 1) * GROUP], strict=True)] + [0.0] * window
        for g in range(KV_HEADS)
    ]


def cake_counts(total: int, window: int, tau1: float, tau2: float) -> list[int]:
    preference = []
    for layer in range(LAYERS):
        part = cake_parts(layer, window)
        entropy = -sum(a * math.log(a) for a in part.flatten().tolist() if a > 0)
        preference.append(entropy ** (1 / tau1) * float(part.var(1).sum()) ** (1 / tau2))
    rest, open_layers, counts = total - LAYERS * window, set(range(LAYERS)), [Fraction(0)] * LAYERS
    while True:  # what a layer can't hold goes to the others
        every = sum(preference[layer] for layer in open_layers)
        for layer in open_layers:
            counts[layer] = Fraction(preference[layer] / every) * rest
        over = {layer for layer in open_layers if counts[layer] > TOKENS - window}
        if not over:
            return whole(counts, total - LAYERS * window)
        for layer in over:
            counts[layer] = Fraction(TOKENS - window)
        rest -= len(over) * (TOKENS - window)
        open_layers -= over


@pytest.mark.parametrize("chunk", [65536, 37, 5])
@pytest.mark.parametrize(("tau1", "tau2"), [(1, 1), (1.6, 0.4), (1e6, 1e6)])
@pytest.mark.parametrize("tokens", [20, 45, 70])
def test_cake_keeps_what_entropy_and_variance_say(tokens: int, tau1: float, tau2: float, chunk: int) -> None:
    method = plugins.build_method("cake", window=10, tau1=tau1, tau2=tau2, base_options={"window": 10, "gamma": 50})
    found = kept(method, see(method, chunk=chunk), tokens)
    counts = cake_counts(LAYERS * tokens, 10, tau1, tau2)
    for layer, count in enumerate(counts):
        assert found[layer] == [best(s, count, 0, 10) for s in cake_scores(layer, 10, 50)]
    assert sum(counts) == LAYERS * (tokens - 10)
    assert (len(set(counts)) == 1) == (tau1 == 1e6)  # without preference equal budgets


def test_cake_scores_alone_have_equal_layers() -> None:
    method = plugins.build_method("cake_scores", window=10, gamma=50)
    assert kept(method, see(method), 40) == [
        [best(s, 30, 0, 10) for s in cake_scores(layer, 10, 50)] for layer in range(LAYERS)
    ]


# -- RazorAttention ----------------------------------------------------------------------------------------------------


def with_maps(seen: Seen, method: Any, seed: int = 0) -> Seen:
    """The context, had the model these head maps."""
    draw = torch.Generator().manual_seed(seed)
    shape = (len(seen.layers), seen.layers[0].key.shape[0])
    names = ("echo", "induction", "error")
    maps = Artefact({name: torch.rand(shape, generator=draw) for name in names}, {}, "")
    return replace(seen, artefacts={method.heads: maps})


def test_copying_is_counted_as_in_the_full_matrix(tiny: Model) -> None:
    """Every row after the first copy, by loops over the attention matrix."""
    found = CopyingHeads(20, repeats=3).fit(tiny)[0]
    ids = torch.randint(tiny.network.vocabulary, (20,), generator=torch.Generator().manual_seed(0)).repeat(3)
    ids = torch.cat([torch.tensor(tiny.writer.head[:1]), ids])
    assert len(ids) == 61
    with torch.inference_mode():
        config: Any = copy.deepcopy(tiny.network._model.config)
        stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        stock.load_state_dict(tiny.network._model.state_dict())
        every = stock(ids[None], output_attentions=True).attentions
    for layer, matrix in enumerate(every):
        echo, induction = torch.zeros(4), torch.zeros(4)
        for i in range(20, 60):
            for j in range(i - 20, -1, -20):  # the first token is no part of what repeats
                echo += matrix[0, :, 1 + i, 1 + j] / 40
                induction += matrix[0, :, 1 + i, 1 + j + 1] / 40
        for name, scores in (("echo", echo), ("induction", induction)):
            expected = torch.stack([scores[:2].max(), scores[2:].max()])
            torch.testing.assert_close(found[name][layer], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ahead", [0, 1], ids=["echo", "induction"])
def test_a_head_built_to_copy_is_found(ahead: int) -> None:
    """Queries that look for the earlier copy of their token, or for the token after it."""
    period, first, total = 7, 1, 22
    key = torch.eye(total)[None].repeat(2, 1, 1)
    at = torch.arange(first + period, total)
    query = torch.zeros(2, len(at), total)
    query[1] = 50 * torch.eye(total)[at - period + ahead]
    found = copying(first, period, Observed(0, query, key, key, first + period, total, 1.0))
    assert found[ahead, 1] > 0.999
    assert found[1 - ahead, 1] < 0.001
    assert (found[:, 0] < 0.3).all()


def test_heads_are_taken_one_by_echo_for_fourteen_by_induction() -> None:
    echo, induction = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(0)).unbind()
    order = copying_order(echo, induction).flatten().argsort(descending=True, stable=True).tolist()
    for times in range(1, 6):
        union = set(echo.flatten().topk(times).indices.tolist())
        union |= set(induction.flatten().topk(min(14 * times, 90)).indices.tolist())
        assert set(order[: len(union)]) == union


@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("tokens", [8, 20, 40, 80])
def test_razorattention_holds_whole_heads_sinks_windows_and_means(tokens: int, compensation: bool) -> None:
    method = plugins.build_method("razorattention", compensation=compensation, threshold=12, ratio=9)
    seen = with_maps(see(method), method)
    made = plan(method, seen, tokens)
    maps = seen.artefacts[method.heads].tensors
    order = copying_order(maps["echo"], maps["induction"]).flatten().argsort(descending=True).tolist()
    heads, streaming = LAYERS * KV_HEADS, min(4 + 12 + compensation, tokens // 2)
    whole_heads = (tokens * heads - heads * streaming) // (TOKENS - streaming)
    total = 0
    for head in range(heads):
        layer, g = divmod(head, KV_HEADS)
        route = made.layers[layer].route[g]
        own = (route[:TOKENS] == 0).nonzero()[:, 0].tolist()
        total += int((route != EVICTED).sum())
        if order.index(head) < whole_heads:
            assert own == list(range(TOKENS))
            assert (route[TOKENS:] == EVICTED).all()
            continue
        first = min(4, len(own) // 2)
        assert len(own) >= streaming - compensation
        assert own == [*range(first), *range(TOKENS - (len(own) - first), TOKENS)]
        if compensation:
            dropped = [t for t in range(TOKENS) if t not in own]
            rows = made.layers[layer].made
            assert rows is not None
            assert route[TOKENS] == 1
            for row, exact in ((rows.key, seen.layers[layer].key), (rows.value, seen.layers[layer].value)):
                mean = sum(exact[g, t] for t in dropped) / len(dropped)
                torch.testing.assert_close(row[g, 0], mean, atol=1e-5, rtol=0)
            assert float(rows.log_multiplicity[g, 0]) == pytest.approx(math.log(len(dropped)))
    assert total == tokens * heads  # the budget is nominal: rows alone


@pytest.mark.parametrize("tiered", [False, True])
def test_razorattention_is_exact_where_dropped_tokens_are_alike(tiered: bool) -> None:
    method = plugins.build_method("razorattention", threshold=10, ratio=90)
    seen = with_maps(see(method), method)
    alike = []
    for x in seen.layers:
        key, value = x.key.clone(), x.value.clone()
        key[:, 2:-4], value[:, 2:-4] = key[:, 5:6].clone(), value[:, 5:6].clone()
        alike.append(SeenLayer(key, value, x.position))
    seen = replace(seen, layers=tuple(alike))
    new = ids_of(NETWORK, 6, seed=2)[None]
    with torch.inference_mode():
        full = feed(NETWORK, [Fork(CompressedCache.pack(keep_all(seen), seen), Method())], new)
        for name, options in (("razorattention", {}), ("razorattention", {"compensation": False})):
            method = plugins.build_method(name, threshold=10, ratio=90, **options)
            seen = with_maps(seen, method)
            cache = CompressedCache.pack(plan(method, seen, 20), seen)
            found = feed(NETWORK, [Fork(cache, method, tiered)], new)
            assert torch.allclose(found, full, atol=5e-5) == (not options)
            assert cache.nbytes < 0.25 * NETWORK.row_bytes() * TOKENS


# -- DuoAttention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [9, 24, 45, 80])
def test_duoattention_holds_retrieval_heads_whole_and_streams_the_others(tokens: int) -> None:
    method = plugins.build_method("duoattention", sinks=3, window=7)
    seen = with_maps(see(method), method)
    found = [head for heads in kept(method, seen, tokens) for head in heads]
    importance = seen.artefacts[method.heads].tensors["error"].flatten().tolist()
    heads, streaming = LAYERS * KV_HEADS, min(10, tokens // 2)
    retrieval = (heads * tokens - heads * streaming) // (TOKENS - streaming)
    best_first = sorted(range(heads), key=lambda i: -importance[i])
    for i in best_first[:retrieval]:
        assert found[i] == list(range(TOKENS))
    for i in best_first[retrieval:]:
        sinks = min(3, 3 * tokens // 20)
        assert len(found[i]) >= streaming
        assert found[i] == [*range(sinks), *range(TOKENS - len(found[i]) + sinks, TOKENS)]
    assert sum(map(len, found)) == heads * tokens


def test_duoattention_takes_trained_gates(tmp_path: Path) -> None:
    file = tmp_path / "gates.tsv"
    file.write_text("".join(f"{0.9 if layer == 2 else 0.1}\t{0.2 + layer / 100}\n" for layer in range(LAYERS)))
    method = plugins.build_method("duoattention", sinks=3, window=7, gates=str(file))
    assert method.calibrations == frozenset()
    found = kept(method, see(method), 28)
    assert [[len(head) == TOKENS for head in heads] for heads in found] == [
        [False, False],
        [False, False],
        [True, False],
        [False, False],
    ]
    file.write_text("0.1\t0.2\n")
    with pytest.raises(UsageError, match=r"\(1, 2\)"):
        kept(method, see(method), 28)


def test_streaming_error_is_what_a_head_lacks() -> None:
    """By loops over heads and tokens, with a softmax of their own."""
    ids, sinks, window = ids_of(NETWORK, 40), 2, 5
    seen = read_exactly(NETWORK, ids[:30])
    with torch.inference_mode():
        ahead = look_ahead(seen, ids[30:])[1]
        found = streaming_error(NETWORK, sinks, window, ahead)
        weight = NETWORK._body.layers[1].self_attn.o_proj.weight.double()
        errors = torch.zeros(KV_HEADS, dtype=torch.float64)
        for i in range(10):
            outs = []
            for few in (False, True):
                slots = [j for j in range(31 + i) if not few or j < sinks or j > 30 + i - window]
                heads = []
                for h in range(KV_HEADS * GROUP):
                    key, value = (x[h // GROUP, slots].double() for x in (ahead.key, ahead.value))
                    weights = (ahead.query[h, i].double() @ key.T * NETWORK.dim**-0.5).softmax(0)
                    part = torch.zeros(KV_HEADS * GROUP, NETWORK.dim, dtype=torch.float64)
                    part[h] = weights @ value
                    heads.append(weight @ part.flatten())
                outs.append(torch.stack(heads).unflatten(0, (KV_HEADS, GROUP)).sum(1))
            errors += (outs[0] - outs[1]).square().sum(1) / outs[0].sum(0).square().sum() / 10
    torch.testing.assert_close(found.double(), errors, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("corpora")
def test_recalled_passages_were_hidden_once(tiny: Model) -> None:
    calibration = RecallingHeads(4, 8, texts=("essays",), sequences=2, tokens=300, passages=3, words=20)
    sequences = calibration._sequences(tiny, "essays")
    assert len(sequences) == 2
    for ids in sequences:
        assert len(ids) == 300
        text = ids.tolist()
        for passage in torch.tensor(text[-60:]).split(20):
            places = [i for i in range(281) if text[i : i + 20] == passage.tolist()]
            assert len(places) == 2  # in the text, and at the end
    assert calibration.fit(tiny)[0]["error"].shape == (tiny.network.layers, tiny.network.kv_heads)


# -- both over any scorer ----------------------------------------------------------------------------------------------

HEAD_METHODS: dict[str, dict[str, Any]] = {
    "duoattention": {"sinks": 3, "window": 20},
    "razorattention": {"sinks": 3, "threshold": 20, "ratio": 9},
}
ROW, HEADS = 2 * NETWORK.dim * 4, LAYERS * KV_HEADS


def head_counts(rows: int, streaming: int, importance: Tensor) -> list[int]:
    """Rows of each KV head: as many whole heads as leave `streaming` for each other one, the rest evenly."""
    streaming = max(min(streaming, rows // HEADS // 2), 1)
    whole_heads = (rows - HEADS * streaming) // (TOKENS - streaming)
    order = importance.flatten().argsort(descending=True).tolist()
    each, more = divmod(rows - whole_heads * TOKENS, HEADS - whole_heads)
    streamers = sorted(order[whole_heads:], key=order.index)
    return [each + (streamers.index(i) < more) if i in streamers else TOKENS for i in range(HEADS)]


def head_rows(name: str, limit: int, seen: Seen, method: Any, recent: int) -> list[tuple[int, int, int]]:
    """(rows of its own, of them the first, the last protected) for each KV head, within `limit` bytes."""
    maps = seen.artefacts[method.heads].tensors
    if name == "razorattention":
        rows = (limit - 12 * HEADS) // ROW
        importance = copying_order(maps["echo"], maps["induction"])
        own = [c if c == TOKENS else c - 1 for c in head_counts(rows, 3 + 20 + 1, importance)]
        firsts = [min(3, c // 2) for c in own]
        return [(c, first, min(recent, c // 2 - first)) for c, first in zip(own, firsts, strict=True)]
    own = head_counts(limit // ROW, 23, maps["error"])
    if any(len(set(own[i : i + KV_HEADS])) > 1 for i in range(0, HEADS, KV_HEADS)):
        own = head_counts((limit - 4 * HEADS) // ROW, 23, maps["error"])
    share = min(Fraction(1), Fraction(limit // ROW // HEADS, 2 * 23))
    return [(c, min(int(3 * share), c), int(min(recent, 10) * share)) for c in own]


@pytest.mark.parametrize("name", HEAD_METHODS)
@pytest.mark.parametrize("base", ["streamingllm", "snapkv", "h2o", "keydiff"])
def test_heads_that_are_not_whole_hold_their_bases_best(name: str, base: str) -> None:
    """The paper's sinks and window where no base is named; else its scores, and the last ones that it protects."""
    options = HEAD_METHODS[name] | {"snapkv": WINDOW, "streamingllm": {}}.get(base, {"base": base})
    method = plugins.build_method(name, **options)
    seen = with_maps(see(method), method)
    if base == "streamingllm":
        assert method.base == base
        scores = [[[float(t) for t in range(TOKENS)]] * KV_HEADS] * LAYERS
    elif base == "snapkv":
        scores = [snapkv_scores(layer) for layer in range(LAYERS)]
    else:
        scores = [plugins.build_method(base).scores(seen, layer).tolist() for layer in range(LAYERS)]
    recent = {"snapkv": 8, "h2o": 10**9}.get(base, 0)
    partial = 0
    for limit in range(NETWORK.row_bytes() * 5, NETWORK.row_bytes() * TOKENS, 3331):
        made = method.plan(seen, Allowance(limit))
        assert CompressedCache.pack(made, seen).nbytes <= limit
        for head, (count, first, last) in enumerate(head_rows(name, limit, seen, method, recent)):
            layer, g = divmod(head, KV_HEADS)
            found = (made.layers[layer].route[g, :TOKENS] == 0).nonzero()[:, 0].tolist()
            if count == TOKENS:
                assert found == list(range(TOKENS))
                continue
            assert found == best(scores[layer][g], count - first - last, first, last), (limit, head)
            partial += 1
            rows = made.layers[layer].made
            if rows is not None:
                dropped = [t for t in range(TOKENS) if t not in found]
                mean = sum(seen.layers[layer].value[g, t] for t in dropped) / len(dropped)
                torch.testing.assert_close(rows.value[g, 0], mean, atol=1e-5, rtol=0)
                assert float(rows.log_multiplicity[g, 0]) == pytest.approx(math.log(len(dropped)))
                assert int(rows.position[g, 0]) == sum(dropped) // len(dropped)
        assert (made.layers[0].made is not None) == (name == "razorattention")
    assert partial > 50


@pytest.mark.parametrize("name", HEAD_METHODS)
def test_what_a_base_needs_is_gathered_and_fitted(name: str) -> None:
    base = plugins.build_method("compresskv")
    method: Any = plugins.build_method(name, base="compresskv")
    assert base.calibrations
    assert method.calibrations == base.calibrations | {method.heads}
    assert method.needs == base.needs
    assert plugins.build_method(name).needs == frozenset()
    with pytest.raises(UsageError, match="base=full scores no tokens"):
        plugins.build_method(name, base="full")


class TestHeadMethodsOverSnapKV(test_methods.TestEveryMethod):
    """The conformance suite, where the base is not the paper's."""

    @pytest.fixture(params=HEAD_METHODS)
    def method(self, request: pytest.FixtureRequest) -> Method:
        return plugins.build_method(request.param, **HEAD_METHODS[request.param], **WINDOW)


# -- all of them -------------------------------------------------------------------------------------------------------

ALLOCATORS = ["pyramidkv", "adakv", "prefixkv", "cake", "duoattention"]


def fake(layers: int, kv_heads: int, tokens: int, seed: int = 0) -> Seen:
    """A context of any shape; nothing but its shape and the statistics of CAKE can be asked for."""
    draw = torch.Generator().manual_seed(seed)
    x = SeenLayer(torch.zeros(kv_heads, tokens, 2), torch.zeros(kv_heads, tokens, 2), torch.arange(tokens))
    moments = tuple(torch.rand(3, kv_heads, tokens, generator=draw) ** 8 for _ in range(layers))
    return replace(SEEN, layers=(x,) * layers, statistics={WindowMoments(32): moments})


SEEN = see(Method())


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(deadline=None, max_examples=150)
@given(
    layers=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    tokens=st.integers(1, 150),
    share=st.floats(0, 1),
    sharp=st.sampled_from([0, 1, 20]),
    seed=st.integers(0, 10**6),
)
def test_every_share_is_possible_and_the_sum_is_the_budget(
    name: str, layers: int, kv_heads: int, tokens: int, share: float, sharp: int, seed: int
) -> None:
    method = plugins.build_method(name)
    heads = layers * kv_heads
    rows = heads + round(share * (heads * tokens - heads))
    if rows == heads * tokens:
        return  # nobody asks: every head holds everything
    seen = fake(layers, kv_heads, tokens, seed)
    if name == "duoattention":
        seen = with_maps(seen, method, seed)
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.rand(kv_heads, tokens, generator=draw) ** sharp for _ in range(layers)]
    counts = method.allocate(seen, scores, rows)
    assert counts.shape == (layers, kv_heads)
    assert rows - heads < int(counts.sum()) <= rows
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= tokens
    if name != "duoattention":  # its sinks shrink with its streaming heads
        first, last = method.protect
        assert int(counts.min()) >= min(first + last, rows // heads // 2)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=12), st.integers(0, 5), st.integers(0, 60), st.data())
def test_shares_are_whole_bounded_and_in_proportion(
    weights: list[float], least: int, room: int, data: st.DataObject
) -> None:
    parts, most = len(weights), least + room
    total = data.draw(st.integers(parts * least, parts * most + 3))
    found = share_out(torch.tensor(weights, dtype=torch.float64), total, least, most).tolist()
    assert sum(found) == min(total, parts * most)
    assert least <= min(found)
    assert max(found) <= most
    for a, x in zip(weights, found, strict=True):
        assert all(x <= y for b, y in zip(weights, found, strict=True) if a < b * (1 - 1e-4))
    every = sum(weights)
    if every > 1e-6 and max(found) < most:
        assert all(
            abs(x - least - (total - parts * least) * w / every) < 1.001 for w, x in zip(weights, found, strict=True)
        )


def test_shares_that_overflow_go_to_the_others() -> None:
    assert share_out(torch.tensor([8.0, 1.0, 1.0]), 20, 0, 10).tolist() == [10, 5, 5]
    assert share_out(torch.tensor([8.0, 0.0, 0.0]), 20, 0, 10).tolist() == [10, 5, 5]
    assert share_out(torch.tensor([1.0, 1.0, 1.0]), 29, 0, 10).tolist() == [10, 10, 9]


@pytest.mark.parametrize("name", ALLOCATORS)
def test_more_rows_than_there_are_tokens_are_all_tokens(name: str) -> None:
    """Asked where a row is less than an exact one: of 4 bits, say."""
    method = plugins.build_method(name)
    seen = fake(3, 2, 50)
    if name == "duoattention":
        seen = with_maps(seen, method)
    scores = [torch.rand(2, 50, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for rows in (300, 301, 500, 2000):
        assert (method.allocate(seen, scores, rows).clamp(max=50) == 50).all()


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 30), st.integers(2, 200), st.integers(0, 300), st.data())
def test_retrieval_heads_are_as_many_as_fit(heads: int, tokens: int, streaming: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(heads, heads * tokens - 1))
    importance = torch.rand(1, heads, generator=torch.Generator().manual_seed(rows))
    counts = retrieval_shares(importance, rows, streaming, tokens)[0]
    assert int(counts.sum()) == rows
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= tokens
    by_rank = counts[importance[0].argsort(descending=True)]
    whole_heads = int((by_rank == tokens).sum())
    assert (by_rank[:whole_heads] == tokens).all()
    rest = by_rank[whole_heads:]
    assert len(rest) > 0
    assert int(rest.max() - rest.min()) <= 1
    assert int(rest.min()) >= max(min(streaming, rows // heads // 2), 1)


# -- what the core does with shares ------------------------------------------------------------------------------------


class Fixed(Method):
    """Some heads have next to nothing."""

    protect = (2, 6)
    counts = ((30, 8), (5, 25), (17, 17), (1, 33))

    def scores(self, seen: Seen, layer: int) -> Tensor:
        return -seen.layers[layer].position.float().expand(KV_HEADS, -1)  # the oldest

    def allocate(self, seen: Seen, scores: Sequence[Tensor], rows: int) -> Tensor:
        return torch.tensor(self.counts)


def test_protected_tokens_are_the_first_a_small_share_holds() -> None:
    """Protection shrinks with the mean share, here 17, and not with a head's own."""
    for heads, counts in zip(kept(Fixed(), SEEN, 17), Fixed.counts, strict=True):
        for head, count in zip(heads, counts, strict=True):
            first = min(2, count)
            last = min(6, count - first)
            assert head == [*range(count - last), *range(TOKENS - last, TOKENS)]


@pytest.mark.parametrize("extra", [0, 1, 31, 32, 33, 400])
def test_a_budget_of_one_row_each_is_never_refused(extra: int) -> None:
    """Even if it has no room for the counts that uneven shares would need."""
    method = plugins.build_method("adakv", **WINDOW)
    seen = see(method)
    made = method.plan(seen, Allowance(NETWORK.row_bytes() + extra))
    assert all(isinstance(layer, LayerPlan) and bool((layer.route == 0).any(1).all()) for layer in made.layers)
    assert CompressedCache.pack(made, seen).nbytes <= NETWORK.row_bytes() + extra
