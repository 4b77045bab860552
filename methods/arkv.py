"""ARKV."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvbench.budget import Allowance
from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.cache.codecs.fp8 import Fp8
from kvbench.cache.fork import Edit, Event
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import EVICTED, EXACT, LayerPlan, Plan, Tier, top_rows, uniform_rows
from kvbench.prefill import Observed, Seen, Statistic
from kvbench.toolbox.eviction import grouped_weights, lasting_dtype
from kvbench.toolbox.statistics import WindowMoments

FP8 = Tier("fp8", Fp8(), Fp8())
ORIGINAL, QUANTISED = 0, 1
pool = partial(avg_pool1d, kernel_size=5, stride=1, padding=2)


@dataclass(frozen=True)
class WindowKurtosis(Statistic):
    """Kurtosis over the context's last `window` queries of their attention to the tokens before them: a number a layer.

    m4 / max(m2, 1e-8)^2 of each token, summed over query heads and tokens. Softmax over all, causal inside the window.
    """

    window: int

    def observe(self, state: Tensor | None, seen: Observed) -> Float[Tensor, "heads window dim"]:
        """The window's queries, as they come."""
        first = max(seen.total - self.window - seen.start, 0)
        query = seen.query[:, first:].float() * seen.scale
        return query if state is None else torch.cat([state, query], 1)

    def finish(self, values: tuple[Tensor, ...], seen: Seen) -> tuple[Float[Tensor, ""], ...]:
        return tuple(self._sum(query, x.key) for query, x in zip(values, seen.layers, strict=True))

    def _sum(self, query: Float[Tensor, "heads window dim"], key: Float[Tensor, "kv_heads tokens dim"]) -> Tensor:
        window, tokens = query.shape[1], key.shape[1]
        mask = causal_mask(window, tokens, key.device)
        total = torch.zeros((), dtype=torch.float64, device=key.device)
        for group, mine in zip(query.split(len(query) // len(key)), key.split(1), strict=True):
            weights = attention_weights(group, mine, 1.0, mask)[..., : tokens - window]
            apart = (weights - weights.mean(1, keepdim=True)).square()
            total += (apart.square().mean(1) / apart.mean(1).clamp(min=1e-8).square()).double().sum()
        return total


@dataclass(frozen=True)
class ARKV(Method):
    """Full precision, 8 bits or evicted, decided again whenever the cache is full (ARKV, arXiv 2603.08727).

    The context's best tokens are kept exactly: mean plus `gamma` times the variance of the last `window` queries'
    attention, pooled over 5 neighbours. New tokens are exact until the bytes of the budget are used up. Then a quarter
    of the tokens before the window leave, by what the newest query attends to; of the others the best O - `window` are
    exact, the rest FP8 (e4m3). O is a layer's share of the rows: entropy^(1/tau1) x variance^(1/tau2) x
    kurtosis^(1/tau3) of the attention above, over the largest such product of any layer. `fp8=false` keeps all that
    stay exactly: the same evictions without the codec.

    Differs: the authors' released code forgets its quantised tokens before they are read, here they are read; it counts
    entries, here the cache is full by its bytes, so what FP8 saves holds more tokens; one scale for each KV head's row,
    not one for all KV heads; a row that stays quantised keeps its bits instead of being rounded again.
    """

    steps: ClassVar[bool] = True
    family: ClassVar[Family] = Family.router
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "exact tokens, and FP8 ones from the first burst on"

    window: int = 32
    gamma: float = 263.81
    tau1: float = 7.774
    tau2: float = 5.407
    tau3: float = 5.528
    fp8: bool = True

    def __post_init__(self) -> None:
        if self.window < 2 or min(self.tau1, self.tau2, self.tau3) <= 0:
            raise UsageError(f"method.window={self.window}: at least 2; tau1, tau2 and tau3 above 0")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowMoments(self.window), WindowKurtosis(self.window)})

    @property
    def protect(self) -> tuple[int, int]:
        return (0, self.window)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        mean, variance, _ = seen.statistics[WindowMoments(self.window)][layer]
        group = (mean + self.gamma * variance).unflatten(0, (seen.layers[layer].key.shape[0], -1)).mean(1)
        before = max(group.shape[1] - self.window, 0)
        return torch.cat([pool(group[:, :before]) if before else group[:, :0], group[:, before:]], 1)

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        rows = uniform_rows(seen, budget, EXACT, per_token=lasting_dtype(seen).itemsize)
        window = min(self.window, rows // 2)
        most = min(rows, len(seen.token_ids)) - window
        layer = Allowance(budget.limit // len(seen.layers), budget.nominal)
        plans = []
        for i, share in enumerate(self._shares(seen)):
            original = min(round(share * (rows - window)), max(most, 0))
            state = (layer, max(original - window, 0), window)
            route = top_rows(self.scores(seen, i), rows, (0, window))
            plans.append(LayerPlan((EXACT,), route, hold_positions=True, state=state))
        return Plan(tuple(plans))

    def _shares(self, seen: Seen) -> list[float]:
        """Of each layer: how much of it should be exact, at most 1."""
        before = max(len(seen.token_ids) - self.window, 0)
        moments = [x[1:, :, :before].double().sum((1, 2)) for x in seen.statistics[WindowMoments(self.window)]]
        variance, entropy = torch.stack(seen.network.gather(moments), 1)
        kurtosis = torch.stack(seen.network.gather(seen.statistics[WindowKurtosis(self.window)]))
        wanted = entropy ** (1 / self.tau1) * variance ** (1 / self.tau2) * kurtosis ** (1 / self.tau3)
        most = wanted.max()
        return (wanted / most if most > 0 else torch.ones_like(wanted)).tolist()

    def step(self, state: tuple[Allowance, int, int], event: Event) -> tuple[Any, Edit | None]:
        budget, original, window = state
        (kv_heads, _, dim), dtype = event.packed.empty.shape, event.packed.empty.dtype
        weight = event.packed.weight()
        tail = budget.charged(*EXACT.row_bytes(dim, dtype)) * kv_heads * (event.slots - event.context)
        if budget.charged(weight.payload, weight.metadata) + tail <= budget.limit:
            return state, None
        past = event.slots - window
        keep = past * 3 // 4
        top = min(original, keep) if self.fp8 else keep
        assert event.position is not None
        order = event.position.argsort(1)  # of slots, by age
        weights = grouped_weights(event).mean(1)
        best = order.gather(1, pool(weights.gather(1, order[:, :past])).topk(keep).indices)
        route = torch.full_like(order, EVICTED, dtype=torch.int8).scatter(1, best, QUANTISED)
        route = route.scatter(1, best[:, :top], ORIGINAL).scatter(1, order[:, past:], ORIGINAL)
        return state, Edit((EXACT, FP8), route)
