"""The conformance suite: what every method in methods/ must do, discovered, on a tiny random model."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import checks
import pytest
import torch
from conftest import ids_of, tiny_network

from kvbench import plugins
from kvbench.artefact import load_or_fit
from kvbench.budget import Budget
from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed
from kvbench.method import Axis, Base, Method
from kvbench.model import Model
from kvbench.plan import EVICTED, Infeasible, Plan, shrink
from kvbench.prefill import Reader, Seen, read_exactly

TOKENS, NEW = 200, 7
BUDGETS = ["0.05", "0.1", "0.25", "0.5", "0.77", "1"]
METHODS = {name: plugins.build_method(name) for name in plugins.files("methods")}
# Methods that also act while decoding are tried both ways.
DECODING = {
    f"{name}-decode": replace(method, decode=True) for name, method in METHODS.items() if hasattr(method, "decode")
}


@pytest.fixture(params=METHODS | DECODING)
def method(request: pytest.FixtureRequest) -> Method:
    return (METHODS | DECODING)[request.param]


def acts_in_time(method: Method) -> bool:
    return method.steps or method.selects


def grows(method: Method) -> bool:
    """Whether budget 1 is the full cache for good: a cap on what is held does not grow with the answer."""
    return not method.steps or method.budget_base is Base.seen


def see(method: Method, model: Model, tokens: int = TOKENS, chunk: int = 65536) -> Seen:
    seen = read_exactly(model.network, ids_of(model.network, tokens), method.needs, "c", chunk)
    return replace(seen, artefacts={c: load_or_fit(c, model) for c in method.calibrations})


@torch.inference_mode()
def pack(method: Method, seen: Seen, budget: str) -> CompressedCache:
    full = seen.network.row_bytes() * len(seen.token_ids)
    allowance = Budget.parse(budget).allow(full, len(seen.token_ids))
    if method.own_prefill:
        reader = Reader(seen.network, seen.token_ids, method.needs, seen.context_id, seen.artefacts)
        return method.prefill(reader, allowance)
    return CompressedCache.pack(method.plan(seen, allowance), seen)


def smallest(method: Method, seen: Seen, budget: str) -> int:
    """The bytes of the smallest plan, where the budget is below it."""
    try:
        pack(method, seen, budget)
    except Infeasible as refused:
        return refused.smallest
    return 0


def near(method: Method, seen: Seen, budget: str) -> str:
    """A budget; or the smallest that is feasible, of a method whose sizes or whose index don't reach down to it."""
    least = smallest(method, seen, budget) if method.fixed_rate or acts_in_time(method) else 0
    full = seen.network.row_bytes() * len(seen.token_ids)
    return f"{math.ceil(1e4 * least / full) / 1e4:g}" if least else budget


def pack_near(method: Method, seen: Seen, budget: str) -> CompressedCache:
    return pack(method, seen, near(method, seen, budget))


def plan_near(method: Method, seen: Seen, budget: str) -> Plan:
    """What `pack_near` packs."""
    full = seen.network.row_bytes() * len(seen.token_ids)
    return method.plan(seen, Budget.parse(near(method, seen, budget)).allow(full, len(seen.token_ids)))


def limit_of(budget: str, network: Network, tokens: int = TOKENS) -> int:
    return Budget.parse(budget).allow(network.row_bytes() * tokens, tokens).limit


@torch.inference_mode()
def spent(method: Method, cache: CompressedCache, network: Network) -> int:
    """The bytes that a budget bounds; of those read, by the first token after the context."""
    if method.axis is not Axis.READ:
        return cache.nbytes
    fork = Fork(cache, method)
    feed(network, [fork], ids_of(network, 1)[None])
    return int(fork.usage.read[0])


def alike(first: CompressedCache, second: CompressedCache) -> bool:
    """Whether two caches hold the same bits."""
    pairs = zip(first.tensors(), second.tensors(), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("own_cache", "corpora")
class TestEveryMethod:
    @pytest.mark.parametrize("budget", BUDGETS)
    def test_holds_what_it_planned_within_the_budget(self, method: Method, tiny: Model, budget: str) -> None:
        seen = see(method, tiny)
        cache = pack_near(method, seen, budget)
        limit = limit_of(near(method, seen, budget), tiny.network)
        assert cache.nbytes == cache.planned.held  # measured = predicted
        if method.budgeted:
            row = tiny.network.row_bytes()
            assert spent(method, cache, tiny.network) <= limit + (row if method.axis is Axis.READ else 0)
            # Filled to within two rows per layer and head, and the metadata of one of them.
            assert method.fixed_rate or acts_in_time(method) or cache.nbytes > limit - 2 * row - 600

    @pytest.mark.parametrize("budget", ["0.2", "0.5", "1"])
    def test_the_budget_holds_at_every_step(self, method: Method, tiny: Model, budget: str) -> None:
        if not acts_in_time(method):
            pytest.skip("does not act in time: what comes after the context is exact, outside of the budget")
        seen, network = see(method, tiny), tiny.network
        budget = near(method, seen, budget)
        fork = Fork(pack(method, seen, budget), method)
        with torch.inference_mode():
            feed(network, [fork], ids_of(network, 60, seed=9)[None])
        for i, used in enumerate(fork.usage.read if method.axis is Axis.READ else fork.usage.held):
            assert int(used) <= limit_of(budget, network, TOKENS + (i + 1 if method.budget_base is Base.seen else 0))

    @pytest.mark.parametrize("tokens", [8, 33, 100])
    def test_short_contexts_neither_crash_nor_go_over(self, method: Method, tiny: Model, tokens: int) -> None:
        seen = see(method, tiny, tokens)
        full = tiny.network.row_bytes() * tokens
        for budget in ("0.3", "0.6", "1"):
            limit = max(int(float(budget) * full), smallest(method, seen, budget))
            if limit <= full:
                cache = pack(method, seen, f"{limit}B")
                assert cache.nbytes == cache.planned.held
                if method.budgeted and method.axis is not Axis.READ:
                    assert cache.nbytes <= limit
        assert pack(method, seen, "1").nbytes == full or not grows(method)

    def test_budget_1_is_the_full_cache(self, method: Method, tiny: Model) -> None:
        if not grows(method):
            pytest.skip("never holds more than the context did: what comes after it takes some of its place")
        seen = see(method, tiny)
        cache = pack(method, seen, "1")
        new = ids_of(tiny.network, NEW, seed=2)[None]
        full = Fork(pack(plugins.build_method("full"), seen, "1"), Method())
        with torch.inference_mode():
            expected = feed(tiny.network, [full], new)
            found = feed(tiny.network, [Fork(cache, method)], new)
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
        assert cache.nbytes == tiny.network.row_bytes() * TOKENS

    def test_same_seed_same_plan_in_any_company(self, method: Method, tiny: Model) -> None:
        """The plan depends on the context alone: not on a second run, nor on statistics that others asked for."""
        cache = pack_near(method, see(method, tiny), "0.25")
        torch.rand(3)
        assert alike(cache, pack_near(method, see(method, tiny), "0.25"))
        if not method.own_prefill:
            every = {need for other in METHODS.values() for need in other.needs}
            company = read_exactly(tiny.network, ids_of(tiny.network, TOKENS), every, "c")
            company = replace(company, artefacts=see(method, tiny).artefacts)
            assert alike(cache, pack_near(method, company, "0.25"))

    def test_changes_nothing_it_saw(self, method: Method, tiny: Model) -> None:
        seen = see(method, tiny)
        before = [(x.key.clone(), x.value.clone()) for x in seen.layers]
        cache = pack_near(method, seen, "0.25")
        with torch.inference_mode():
            feed(tiny.network, [Fork(cache, method)], ids_of(tiny.network, NEW)[None])
        for (key, value), x in zip(before, seen.layers, strict=True):
            assert torch.equal(key, x.key)
            assert torch.equal(value, x.value)

    @pytest.mark.parametrize("budget", ["0.1", "0.5"])
    def test_forks_never_see_each_other(self, method: Method, tiny: Model, budget: str) -> None:
        checks.forks_never_see_each_other(tiny.network, pack_near(method, see(method, tiny), budget), method)

    def test_batch_equals_solo(self, method: Method, tiny: Model) -> None:
        seen = see(method, tiny)
        checks.batch_equals_solo(tiny.network, [pack_near(method, seen, b) for b in ("0.1", "0.5")], method)

    def test_a_block_equals_token_by_token(self, method: Method, tiny: Model) -> None:
        checks.block_equals_single(tiny.network, pack_near(method, see(method, tiny), "0.25"), method)

    def test_tiers_attend_as_the_oracle(self, method: Method, tiny: Model) -> None:
        if method.steps or method.selects:
            pytest.skip("acts in time: the tiered path is for caches that only grow")
        cache = pack_near(method, see(method, tiny), "0.25")
        new = ids_of(tiny.network, NEW, seed=8)[None]
        with torch.inference_mode():
            oracle = feed(tiny.network, [Fork(cache, method)], new)
            tiered = feed(tiny.network, [Fork(cache, method, tiered=True)], new)
        torch.testing.assert_close(tiered, oracle, atol=2e-4, rtol=0)

    def test_chunked_reading_plans_alike(self, method: Method, tiny: Model) -> None:
        if method.own_prefill:
            pytest.skip("reads in its own way")
        plans = [plan_near(method, see(method, tiny, chunk=chunk), "0.25") for chunk in (65536, 64)]
        for whole, chunked in zip(plans[0].layers, plans[1].layers, strict=True):
            assert (whole.route == chunked.route).float().mean() > 0.99  # ties may fall differently

    def test_protected_tokens_are_kept(self, method: Method, tiny: Model) -> None:
        if type(method).plan is not Method.plan or method.own_prefill:
            pytest.skip("has a plan of its own: its tests say what it keeps")
        plan = plan_near(method, see(method, tiny), "0.25")
        rows = [(layer.route != EVICTED).sum() / len(layer.route) for layer in plan.layers]
        for layer, kept in zip(plan.layers, rows, strict=True):
            first, last = shrink(method.protect, int(min(kept, min(rows))), TOKENS)
            for head in layer.route:
                mine = shrink((first, last), int((head != EVICTED).sum()), TOKENS)
                assert (head[: mine[0]] != EVICTED).all()
                assert (head[TOKENS - mine[1] :] != EVICTED).all()

    def test_a_cache_in_bfloat16(self, method: Method, tiny: Model) -> None:
        """Half the bytes, the same shares: planned = held, within the budget, and nothing but numbers comes out."""
        network = Network(copy.deepcopy(tiny.network._model), torch.bfloat16)
        half = replace(tiny, network=network, config=replace(tiny.config, dtype="bfloat16"))
        assert network.row_bytes() * 2 == tiny.network.row_bytes()
        seen = see(method, half)
        assert seen.layers[0].key.dtype == torch.bfloat16
        cache = pack_near(method, seen, "0.25")
        assert cache.nbytes == cache.planned.held
        if method.budgeted and method.axis is not Axis.READ:
            assert cache.nbytes <= limit_of(near(method, seen, "0.25"), network)
        with torch.inference_mode():
            assert feed(network, [Fork(cache, method)], ids_of(network, NEW)[None]).isfinite().all()

    def test_nominal_budgets_are_never_refused_for_metadata(self, method: Method, tiny: Model) -> None:
        seen = see(method, tiny)
        for budget in ("0.9r", "20tok"):
            cache = pack(method, seen, budget)
            if method.budgeted and method.axis is Axis.HELD:
                assert cache.planned.payload <= 20 * tiny.network.row_bytes()

    def test_refuses_with_the_smallest_plan(self, method: Method, tiny: Model) -> None:
        if not method.budgeted:
            pytest.skip("ignores the budget")
        seen = see(method, tiny)
        with pytest.raises(Infeasible) as refused:
            pack(method, seen, "1B")
        cache = pack(method, seen, f"{refused.value.smallest}B")
        row = tiny.network.row_bytes() if method.axis is Axis.READ else 0  # a token's own
        assert 0 < spent(method, cache, tiny.network) <= refused.value.smallest + row

    def test_docstring_says_where_it_comes_from(self, method: Method) -> None:
        doc = " ".join((type(method).__doc__ or "").split())
        assert any(word in doc for word in ("arXiv", "no paper", "the reference"))
        assert plugins.about(plugins.files("methods")[plugins.name_of(method)]).summary


def test_wide_contexts_hold_wider_positions(tiny: Model) -> None:
    """Above 65,536 tokens positions and ids need 4 bytes: the formula and the storage must agree on it."""
    from kvbench.cache.layout import index_dtype, widen

    for count in (2**16, 2**16 + 1):
        top = torch.tensor([0, count - 1])
        assert torch.equal(widen(top.to(index_dtype(count))), top)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_budget_1_reproduces_stock_transformers(family: str) -> None:
    """Greedy tokens identical, logits to 1e-4 in float32."""
    from transformers import AutoModelForCausalLM

    network = tiny_network(family)
    config: Any = copy.deepcopy(network._model.config)  # setting an attention function writes to it
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    stock.load_state_dict(network._model.state_dict())
    ids = ids_of(network, 80)
    full = plugins.build_method("full")
    with torch.inference_mode():
        seen = read_exactly(network, ids[:60])
        fork = Fork(pack(full, seen, "1"), full)
        logits = feed(network, [fork], ids[None, 60:])
        torch.testing.assert_close(logits, stock(ids[None]).logits[:, 60:], atol=1e-4, rtol=0)
        from kvbench.decode import greedy

        [answer] = greedy(network, [fork], logits[:, -1], lambda _: False, 20)
        expected = stock.generate(
            ids[None],
            attention_mask=torch.ones(1, 80, dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
        )
    assert answer == expected[0, 80:].tolist()
