"""DapQ, KVzip, CriticalKV and CompressKV: what they keep, against stock transformers' full attention matrices."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from kvbench.methods.dapq import FutureAttention, mean_attention
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvbench import plugins
from kvbench.artefact import Artefact, load_or_fit
from kvbench.budget import Allowance
from kvbench.cache.hf import Network
from kvbench.corpora import documents
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import EVICTED
from kvbench.prefill import Seen, look_ahead, read_exactly
from kvbench.toolbox.retrieval_heads import LayerErrors, SemanticHeads, _hide, layer_rows, needle_attention
from kvbench.toolbox.routers import as_mass
from kvbench.toolbox.statistics import OVERLAP, OutputNorms, Reconstruction, output_norms

TOKENS = 100


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network()


@pytest.fixture(scope="module")
def stock(network: Network) -> Any:
    """The same weights in stock transformers, which shows its attention matrices."""
    config: Any = copy.deepcopy(network._model.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(network._model.state_dict())
    return model


def matrices(stock: Any, ids: Tensor) -> list[Tensor]:
    """The attention matrix (heads, tokens, tokens) of each layer."""
    with torch.inference_mode():
        return [matrix[0] for matrix in stock(ids[None], output_attentions=True).attentions]


@torch.inference_mode()
def see(network: Network, method: Method, tokens: int = TOKENS, chunk: int = 65536) -> Seen:
    return read_exactly(network, ids_of(network, tokens), method.needs, "c", chunk)


def kept(method: Method, seen: Seen, tokens: int) -> list[Tensor]:
    """Per layer: which tokens each KV head keeps of a nominal budget of `tokens`."""
    limit = Allowance(seen.network.row_bytes() * tokens, nominal=True)
    return [layer.route != EVICTED for layer in method.plan(seen, limit).layers]


def best(scores: list[float], keep: int, always: set[int]) -> set[int]:
    """Naive: the tokens that stay, and then the best others."""
    order = sorted((t for t in range(len(scores)) if t not in always), key=lambda t: -scores[t])
    return always | set(order[: keep - len(always)])


def sets(keep: Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in keep]


def pooled(row: Tensor, pool: int) -> list[float]:
    """Naive mean over the neighbours that there are."""
    half = pool // 2
    return [float(row[max(t - half, 0) : t + half + 1].mean()) for t in range(len(row))]


# -- DapQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [65536, 37])
@pytest.mark.parametrize(("tokens", "queries", "pool"), [(TOKENS, 32, 5), (TOKENS, 7, 1), (TOKENS, 1, 3), (12, 32, 5)])
def test_dapq_keeps_what_the_full_attention_matrix_says(
    network: Network, stock: Any, tokens: int, queries: int, pool: int, chunk: int
) -> None:
    method = plugins.build_method("dapq", queries=queries, pool=pool)
    seen = see(network, method, tokens, chunk)
    ids = ids_of(network, tokens).tolist()
    head, tail = ids[: queries - queries // 2], ids[-(queries // 2) :] if queries > 1 else []
    for layer, matrix in enumerate(matrices(stock, torch.tensor(ids + head + tail))):
        rows = matrix[:, tokens:, :tokens].mean(1)
        expected = [pooled(rows[2 * g : 2 * g + 2].mean(0), pool) for g in range(network.kv_heads)]
        torch.testing.assert_close(method.scores(seen, layer), torch.tensor(expected), atol=1e-5, rtol=0)
        found = sets(kept(method, seen, tokens // 3)[layer])
        assert found == [best(row, tokens // 3, set()) for row in expected]


def test_dapq_leaves_the_context_as_it_was(network: Network) -> None:
    method = plugins.build_method("dapq")
    seen, plain = see(network, method), see(network, Method())
    assert seen.next_position == TOKENS
    for x, y in zip(seen.layers, plain.layers, strict=True):
        assert torch.equal(x.key, y.key)
        assert torch.equal(x.value, y.value)


@torch.inference_mode()
def test_dapq_with_the_models_own_answer_sees_what_that_attends_to_better_than_with_other_tokens(
    network: Network, stock: Any
) -> None:
    """Recall of the tokens that true decoding attends to, over several contexts."""
    recalls: dict[str, float] = {"own": 0, "pseudo": 0}
    for seed in range(6):
        ids = ids_of(network, TOKENS, seed=100 + seed)
        full = stock.generate(ids[None], attention_mask=torch.ones(1, TOKENS, dtype=torch.long), max_new_tokens=16)
        answer = full[0, TOKENS:]
        need = FutureAttention(16)
        seen = read_exactly(network, ids, {need})
        truth = [m[:, TOKENS:, :TOKENS].mean(1) for m in matrices(stock, torch.cat([ids, answer]))]
        own = look_ahead(seen, answer, observe=mean_attention)
        for name, found in (("own", own), ("pseudo", seen.statistics[need])):
            for a, b in zip(truth, found, strict=True):
                top = [x.topk(20, dim=1).indices for x in (a, b)]
                recalls[name] += sum(
                    len(set(p) & set(q)) for p, q in zip(top[0].tolist(), top[1].tolist(), strict=True)
                )
    assert recalls["own"] >= 0.99 * 6 * 2 * network.heads * 20  # the same matrix, up to rounding
    assert recalls["pseudo"] < recalls["own"]


@pytest.mark.parametrize("options", [{"queries": 0}, {"pool": 4}, {"pool": 0}])
def test_dapq_checks_its_options(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        plugins.build_method("dapq", **options)


# -- KVzip -------------------------------------------------------------------------------------------------------------


def repeated(stock: Any, network: Network, ids: Tensor, chunk: int, sinks: int) -> list[Tensor]:
    """Naive scores: full attention matrices over context and chunk, a softmax over some columns by renormalising."""
    tokens = len(ids)
    found = [torch.zeros(network.kv_heads, tokens) for _ in range(network.layers)]
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        fed = ids[max(start - OVERLAP, 0) : end]
        first = list(range(min(sinks, start)))
        columns = first + list(range(start, end)) + list(range(tokens, tokens + len(fed)))
        for layer, matrix in enumerate(matrices(stock, torch.cat([ids, fed]))):
            for head in range(network.heads):
                for query in matrix[head, tokens:]:
                    weights = query[columns] / query[columns].sum()
                    place = found[layer][head // 2, start:end]
                    torch.maximum(place, weights[len(first) : len(first) + end - start], out=place)
    return found


@pytest.mark.parametrize("reading", [65536, 33])
@pytest.mark.parametrize(("tokens", "chunk", "sinks"), [(TOKENS, 200, 4), (TOKENS, 40, 4), (TOKENS, 33, 0), (5, 2, 4)])
def test_kvzip_scores_are_those_of_the_full_attention_matrix(
    network: Network, stock: Any, tokens: int, chunk: int, sinks: int, reading: int
) -> None:
    method = plugins.build_method("kvzip", chunk=chunk, sinks=sinks)
    seen = see(network, method, tokens, reading)
    for layer, expected in enumerate(repeated(stock, network, ids_of(network, tokens), chunk, sinks)):
        scores = method.scores(seen, layer)
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=0)
        assert 0 <= float(scores.min()) <= float(scores.max()) <= 1 + 1e-6


def test_kvzip_is_the_same_however_many_queries_are_scored_at_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = plugins.build_method("kvzip")
    before = see(network, method).statistics[Reconstruction(2048, 4)]
    monkeypatch.setattr("kvbench.toolbox.statistics.AT_ONCE", 7)
    for a, b in zip(before, see(network, method).statistics[Reconstruction(2048, 4)], strict=True):
        torch.testing.assert_close(a, b)


def test_kvzip_in_chunks_is_alike_but_not_the_same(network: Network) -> None:
    scores = [
        torch.stack(see(network, plugins.build_method("kvzip", chunk=c)).statistics[Reconstruction(c, 4)]).flatten()
        for c in (TOKENS, TOKENS // 2)
    ]
    assert float(torch.corrcoef(torch.stack(scores))[0, 1]) > 0.5
    assert not torch.allclose(*scores)


@pytest.mark.parametrize("tokens", [7, 20, 60])
def test_kvzip_keeps_the_best_of_all_layers_and_heads(network: Network, tokens: int) -> None:
    method = plugins.build_method("kvzip", sinks=0)
    seen = see(network, method)
    heads, rows = network.layers * network.kv_heads, tokens * network.layers * network.kv_heads
    scores = torch.cat([method.scores(seen, layer) for layer in range(network.layers)])
    expected = [{int(row.argmax())} for row in scores]  # one each
    places = sorted(((h, t) for h in range(heads) for t in range(TOKENS)), key=lambda p: -float(scores[p]))
    for head, token in places:
        if sum(map(len, expected)) == rows:
            break
        expected[head].add(token)
    found = [keep for layer in kept(method, seen, tokens) for keep in sets(layer)]
    assert found == expected
    assert len({len(keep) for keep in found}) > 1


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 6), st.integers(0, 99), st.booleans())
def test_kvzip_gives_away_every_row_and_one_to_each_head(
    network: Network, tokens: int, extra: int, sinks: int, seed: int, flat: bool
) -> None:
    method, seen = plugins.build_method("kvzip", sinks=sinks), see(network, Method(), 3)
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.rand(3, tokens, generator=draw) ** 8 * (0 if flat else 1) for _ in range(2)]
    rows = min(6 + extra * seed // 9, 6 * tokens)
    counts = method.allocate(seen, scores, rows)
    assert int(counts.sum()) == rows
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= tokens
    assert int(counts.min()) > min(sinks, rows // 12) or tokens <= sinks or rows == 6 * tokens


def test_kvzip_keeps_its_first_tokens_everywhere(network: Network) -> None:
    method = plugins.build_method("kvzip", sinks=6)
    seen = see(network, method)
    for keep in kept(method, seen, 40):
        assert keep[:, :6].all() or int(keep.sum(1).min()) < 12
        assert keep[:, :3].all()


@pytest.mark.parametrize("window", [1, 8])
def test_kvzip_keeps_a_window_everywhere_if_asked_to(network: Network, window: int) -> None:
    method = plugins.build_method("kvzip", window=window)
    seen = see(network, method)
    free = plugins.build_method("kvzip")
    assert all(keep[:, -window:].all() and keep[:, :4].all() for keep in kept(method, seen, 40))
    assert not all(keep[:, -window:].all() for keep in kept(free, seen, 40))
    assert sum(int(keep.sum()) for keep in kept(method, seen, 40)) == sum(int(k.sum()) for k in kept(free, seen, 40))


def test_kvzip_repeats_once_for_all_budgets_and_leaves_nothing_behind(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = plugins.build_method("kvzip", chunk=50)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return look_ahead(*args, **kwargs)

    monkeypatch.setattr("kvbench.toolbox.statistics.look_ahead", counted)
    seen, plain = see(network, method), see(network, Method())
    for tokens in (10, 20, 30, 40):
        kept(method, seen, tokens)
    assert len(calls) == 2
    assert seen.next_position == TOKENS
    for x, y in zip(seen.layers, plain.layers, strict=True):
        assert torch.equal(x.key, y.key)
        assert torch.equal(x.value, y.value)


# -- CriticalKV --------------------------------------------------------------------------------------------------------


def norms(network: Network, stock: Any, seen: Seen) -> list[list[list[float]]]:
    """Naive: each value alone in its query head's place, through the stock module of the output projection."""
    found = []
    for layer, x in enumerate(seen.layers):
        module = stock.model.layers[layer].self_attn.o_proj
        rows = []
        for g in range(network.kv_heads):
            row = []
            for value in x.value[g]:
                each = []
                for head in (2 * g, 2 * g + 1):
                    whole = torch.zeros(network.heads * network.dim)
                    whole[head * network.dim : (head + 1) * network.dim] = value
                    each.append(float(module(whole).abs().sum()))
                row.append(sum(each) / 2)
            rows.append(row)
        found.append(rows)
    return found


@torch.inference_mode()
@pytest.mark.parametrize(
    ("base", "base_options"), [("snapkv", {"window": 8}), ("random", {}), ("kvzip", {}), ("keydiff", {})]
)
@pytest.mark.parametrize("safe", [0.0, 0.25, 0.5, 1.0])
def test_criticalkv_keeps_what_its_two_stages_say(
    network: Network, stock: Any, base: str, base_options: dict[str, Any], safe: float
) -> None:
    plain = plugins.build_method(base, **base_options)
    method = plugins.build_method("criticalkv", base=base, base_options=base_options, safe=safe)
    seen = see(network, method)
    size = norms(network, stock, seen)
    keeps, bases = kept(method, seen, 30), kept(plain, seen, 30)
    for layer in range(network.layers):
        raw = plain.scores(seen, layer)
        positive = as_mass(raw, plain.scale)
        for g in range(network.kv_heads):
            keep = int(bases[layer][g].sum())
            first, last = plain.protect
            always = {*range(first), *range(TOKENS - last, TOKENS)}
            assert len(always) <= keep // 2
            stage = best(raw[g].tolist(), max(int(safe * keep), len(always)), always)
            critical = [(float(s) + 1e-4) * n for s, n in zip(positive[g], size[layer][g], strict=True)]
            expected = best(critical, keep, stage)
            found = sets(keeps[layer])[g]
            assert found == expected
            assert stage <= found
            assert len(found) == keep
            if safe == 1:
                assert found == sets(bases[layer])[g]
    if safe < 1:
        assert any(not torch.equal(a, b) for a, b in zip(keeps, bases, strict=True))


def test_criticalkv_removes_less_of_the_output_than_its_base() -> None:
    """On random tensors, at as many rows: the L1 mass that is kept (which the paper's bound rests on), and in the mean
    the output that is removed. With the kept weights brought to sum 1 again the output itself may be further off.
    """
    method = plugins.build_method("criticalkv", base="random", safe=0.5)
    removed = torch.zeros(2)
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        value = torch.randn(1, 64, 16, generator=draw) * torch.randn(1, 64, 1, generator=draw).mul(0.3).exp()
        projection = torch.randn(1, 16, 24, generator=draw)
        weights = torch.randn(1, 64, generator=draw).mul(2).softmax(-1)
        parts = weights[0, :, None] * (value @ projection)[0]
        critical = (weights + 1e-4) * output_norms(value, projection)
        mine = (method._two_stages(weights, critical, 16) == 0)[0]
        base = torch.zeros_like(mine).scatter(0, weights[0].topk(16).indices, True)
        mass = [float(parts[keep].abs().sum()) for keep in (base, mine)]
        assert mass[1] >= mass[0] - 1e-4 * float(output_norms(value, projection).sum())
        removed += torch.stack([parts[~keep].sum(0).abs().sum() for keep in (base, mine)])
    assert removed[1] < 0.97 * removed[0]


@torch.inference_mode()
def test_output_norms_do_not_depend_on_how_many_tokens_are_projected_at_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = plugins.build_method("criticalkv")
    before = see(network, method).statistics[OutputNorms()]
    monkeypatch.setattr("kvbench.toolbox.statistics.AT_ONCE", 7)
    for a, b in zip(before, see(network, method).statistics[OutputNorms()], strict=True):
        torch.testing.assert_close(a, b)


def test_criticalkv_lets_its_base_say_how_many_rows_a_head_has(network: Network) -> None:
    plain, method = plugins.build_method("kvzip"), plugins.build_method("criticalkv", base="kvzip")
    seen = see(network, method)
    counts = [[keep.sum(1).tolist() for keep in kept(m, seen, 30)] for m in (plain, method)]
    assert counts[0] == counts[1]
    assert len({n for layer in counts[0] for n in layer}) > 1


@pytest.mark.parametrize("safe", [-0.1, 1.5])
def test_criticalkv_checks_its_share(safe: float) -> None:
    with pytest.raises(UsageError):
        plugins.build_method("criticalkv", safe=safe)


def test_scores_that_only_rank_become_positive_and_keep_their_order() -> None:
    scores = torch.tensor([[-3.0, 2.0, 0.5, 0.4], [1.0, 1.0, 1.0, 1.0]])
    mass = as_mass(scores, plugins.build_method("keydiff").scale)
    assert (mass > 0).all()
    assert mass[0].argsort().tolist() == scores[0].argsort().tolist()
    torch.testing.assert_close(mass[1], torch.full((4,), 0.25))
    assert as_mass(scores, plugins.build_method("snapkv").scale) is scores


# -- CompressKV --------------------------------------------------------------------------------------------------------


def calibrated(method: Any, seen: Seen, heads: Tensor, errors: Tensor) -> Seen:
    """`seen` with artefacts of the test's own."""
    made = {
        SemanticHeads(): Artefact({"heads": heads}, {}, ""),
        method.layer_errors: Artefact({"errors": errors}, {}, ""),
    }
    return replace(seen, artefacts=made)


HEADS = torch.tensor([[0.1, 0.2, 0.9, 0.3], [0.8, 0.1, 0.2, 0.7]])


@pytest.mark.parametrize(("share", "chosen"), [(0.125, [[2], [0]]), (0.5, [[2, 3], [0, 3]]), (1, [[0, 1, 2, 3]] * 2)])
@pytest.mark.parametrize(
    ("tokens", "mean", "rows", "last"),
    [(TOKENS, 44, [38, 50], 8), (16, 6, [6, 6], 3), (6, 3, [3, 3], 1)],  # 32 + a share of 2 x (44 - 32)
)
def test_compresskv_keeps_what_its_heads_say(
    network: Network,
    stock: Any,
    share: float,
    chosen: list[list[int]],
    tokens: int,
    mean: int,
    rows: list[int],
    last: int,
) -> None:
    method = plugins.build_method("compresskv", heads=share)
    seen = calibrated(method, see(network, method, tokens), HEADS, torch.tensor([0.25, 0.75]))
    for layer, matrix in enumerate(matrices(stock, ids_of(network, tokens))):
        window = min(8, tokens)
        mean_row = torch.stack([matrix[h, -window:].sum(0) for h in chosen[layer]]).mean(0)
        before = tokens - window
        scores = pooled(mean_row[:before], 5) + pooled(mean_row[before:], 5)
        expected = best(scores, rows[layer], set(range(tokens - last, tokens)))
        assert sets(kept(method, seen, mean)[layer]) == [expected] * network.kv_heads


def test_compresskv_with_all_heads_is_snapkv_averaged_over_heads(network: Network) -> None:
    method = plugins.build_method("compresskv", heads=1.0)
    snapkv = plugins.build_method("snapkv", window=8)
    seen = calibrated(method, see(network, method), HEADS, torch.tensor([0.5, 0.5]))
    for layer in range(network.layers):
        expected = snapkv.scores(seen, layer).mean(0)
        scores = method.scores(seen, layer)
        torch.testing.assert_close(scores[0, :-10], expected[:-10])  # the window's edge is pooled apart
        assert torch.equal(scores[0], scores[1])


@settings(deadline=None)
@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=12),
    st.integers(1, 3000),
    st.integers(0, 11),
    st.integers(1, 400),
)
def test_layers_share_all_rows_within_their_bounds(errors: list[float], mean: int, odd: int, tokens: int) -> None:
    share = [e / sum(errors) for e in errors]
    rows = min(mean * len(share) + odd % len(share), tokens * len(share))
    mean = rows // len(share)
    found = layer_rows(share, rows, tokens)
    assert all(min(32, mean) <= n <= min(3 * mean, tokens) for n in found)
    assert sum(found) == min(rows, len(share) * min(3 * mean, tokens))
    ordered = sorted(zip(share, found, strict=True))
    assert all(a[1] <= b[1] + 1 for a, b in itertools.pairwise(ordered))


def test_equal_errors_give_equal_layers_and_others_their_share() -> None:
    assert layer_rows([0.25] * 4, 400, 1000) == [100] * 4
    assert layer_rows([0.1, 0.2, 0.3, 0.4], 400, 1000) == [59, 86, 114, 141]  # 32 + e * 272, by hand
    assert layer_rows([0.02, 0.03, 0.05, 0.9], 400, 1000) == [37, 40, 46, 277]
    # 71 each and 3756, cut to 3000: the others take what is left over, one row at a time.
    assert layer_rows([0.01, 0.01, 0.01, 0.97], 4000, 5000) == [334, 333, 333, 3000]


@torch.inference_mode()
def test_needle_attention_is_that_of_the_full_matrix(network: Network, stock: Any) -> None:
    ids, answer = ids_of(network, 60), ids_of(network, 6, seed=5)
    found = needle_attention(network, ids, (20, 26), answer)
    for layer, matrix in enumerate(matrices(stock, torch.cat([ids, answer]))):
        for head in range(network.heads):  # the query of the token before predicts each answer token
            rows = [float(matrix[head, 59 + i, 20:26].sum()) for i in range(6)]
            assert float(found[layer, head]) == pytest.approx(sum(rows) / 6, abs=1e-5)


@pytest.mark.usefixtures("own_cache", "corpora")
class TestCalibration:
    @pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
    def test_the_needle_is_where_it_is_said_to_be(self, tiny: Model, depth: float) -> None:
        article, text = documents("squad", "calibration")[1], documents("essays", "calibration")[0]
        ids, (start, end), answer = _hide(tiny, article, text, 300, depth)
        assert ids[start:end].tolist() == answer.tolist()
        said = tiny.writer.decode(answer.tolist())
        assert said in article
        assert said.endswith(".")
        head = len(tiny.writer.head)
        assert start == head + int(depth * 300) + len(tiny.writer.encode("\n"))
        before, after = ids[head : start - 1].tolist(), ids[end + 1 : end + 1 + 300 - int(depth * 300)].tolist()
        assert tiny.writer.decode(before + after) == tiny.writer.decode(list(tiny.writer.encode(text)[:300]))
        asked = tiny.writer.decode(ids[end:].tolist())
        assert article.partition("\n")[0] in asked

    @torch.inference_mode()
    def test_layer_errors_are_those_of_masked_full_attention(self, tiny: Model) -> None:
        """O' by renormalising stock transformers' attention over the kept tokens, O and W_O from its module's hook."""
        network = tiny.network
        config: Any = copy.deepcopy(network._model.config)
        stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        stock.load_state_dict(network._model.state_dict())
        calibration = LayerErrors(0.5, 8, 5, tokens=120, steps=10)
        ids = ids_of(network, 130)
        found = calibration._errors(network, ids, HEADS.topk(2).indices)
        outputs: list[Tensor] = []
        for block in stock.model.layers:
            block.self_attn.o_proj.register_forward_hook(lambda m, i, o: outputs.append(o[0]))
        whole = read_exactly(network, ids)
        for layer, matrix in enumerate(matrices(stock, ids)):
            window = matrix[HEADS[layer].topk(2).indices, 112:120, :120].sum(1).mean(0)
            scores = pooled(window[:-8], 5) + pooled(window[-8:], 5)
            keep = sorted(best(scores, 32, set(range(112, 120))))
            error = 0.0
            for query in range(120, 130):
                seen = keep + list(range(120, query + 1))
                heads = []
                for head in range(network.heads):
                    weights = matrix[head, query, seen] / matrix[head, query, seen].sum()
                    heads.append(weights @ whole.layers[layer].value[head // 2, seen])
                few = stock.model.layers[layer].self_attn.o_proj(torch.cat(heads))
                full = outputs[layer][query]
                error += float((full - few).norm() / (full.norm() + 1e-5))
            assert float(found[layer]) == pytest.approx(error, rel=1e-4)
            outputs = outputs[: network.layers]

    def test_errors_are_shares_and_the_fit_is_kept(self, tiny: Model) -> None:
        calibration = LayerErrors(0.125, 8, 5, tokens=64, steps=8, sequences=2)
        errors = load_or_fit(calibration, tiny).tensors["errors"]
        assert float(errors.sum()) == pytest.approx(1)
        assert (errors > 0).all()
        assert errors[0] != errors[1]
        heads = load_or_fit(SemanticHeads(), tiny).tensors["heads"]
        assert heads.shape == (tiny.network.layers, tiny.network.heads)
        assert float(heads.min()) > 0
        assert float(heads.max()) < 1


@pytest.mark.parametrize("options", [{"heads": 0.0}, {"heads": 1.5}, {"window": 0}, {"pool": 2}])
def test_compresskv_checks_its_options(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        plugins.build_method("compresskv", **options)


# -- under other methods -----------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.usefixtures("own_cache", "corpora")
@pytest.mark.parametrize("base", ["dapq", "kvzip", "criticalkv", "compresskv"])
def test_works_as_a_base(tiny: Model, base: str) -> None:
    for name in ("vector", "adakv"):
        method = plugins.build_method(name, base=base)
        seen = see(tiny.network, method, 200)
        seen = replace(seen, artefacts={c: load_or_fit(c, tiny) for c in method.calibrations})
        limit = tiny.network.row_bytes() * 60
        plan = method.plan(seen, Allowance(limit))
        alone = kept(plugins.build_method("random"), seen, 60)
        assert any(not torch.equal(x.route != EVICTED, y) for x, y in zip(plan.layers, alone, strict=True))
