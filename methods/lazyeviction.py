"""LazyEviction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from kvbench.budget import Allowance
from kvbench.cache.fork import Event, Keep
from kvbench.cache.layout import widen
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import EXACT, LayerPlan, Plan, top_rows, uniform_rows
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.eviction import grouped_weights, lasting_dtype
from kvbench.toolbox.statistics import WindowAttention


@dataclass(frozen=True)
class LazyEviction(Method):
    """Evict every `window` steps what isn't due for attention again (Zhang et al., arXiv 2506.15969).

    Attention of at least `alpha` activates a token; its longest interval between activations so far says whether it is
    due. The last `window` tokens stay. Defaults are the paper's for an 8B Llama on MATH. Differs: one set per KV head,
    which the strongest of its query heads activates (the paper's code caches every query head); the formula is the
    paper's, without a constant that its code adds. The paper keeps the whole context until it decodes; here it is cut
    once, by what its last `window` queries attend to, and starts with no activations. Room for the tokens that come in
    between evictions is left from the start; `window` shrinks to half of what an eviction leaves.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.reconstructed
    query_aware: ClassVar[bool] = True
    steps: ClassVar[bool] = True

    window: int = 52
    alpha: float = 5e-4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"method.window={self.window} must be at least 1")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowAttention(self.window)})

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        dtype = lasting_dtype(seen)
        rows = uniform_rows(seen, budget, EXACT, per_token=2 * dtype.itemsize)
        keep, window = self._split(rows)
        layers = []
        for x, attention in zip(seen.layers, seen.statistics[WindowAttention(self.window)], strict=True):
            scores = attention.unflatten(0, (len(x.key), -1)).amax(1)
            route = top_rows(scores, keep, (0, window))
            counts = x.key.new_zeros(2, len(x.key), min(keep, x.key.shape[1]), dtype=dtype)
            layers.append(LayerPlan((EXACT,), route, state=(counts, 0, rows)))
        return Plan(tuple(layers))

    def _split(self, rows: int) -> tuple[int, int]:
        """(rows after an eviction, steps between evictions), for at most `rows` rows in between."""
        window = max(min(self.window, (rows + 1) // 3), 1)
        return rows + 1 - window, window

    def step(self, state: tuple[Tensor, int, int], event: Event) -> tuple[tuple[Tensor, int, int], Keep | None]:
        counts, step, rows = state
        last, longest = widen(counts)  # the step of the last activation, the longest interval between two
        last, longest = pad(last, (0, 1), value=step), pad(longest, (0, 1))
        step += 1
        active = grouped_weights(event).amax(1) >= self.alpha
        longest = torch.where(active, longest.maximum(step - last), longest)
        new = torch.stack([last.masked_fill(active, step), longest]).to(counts.dtype)
        keep, window = self._split(rows)
        if event.slots <= keep or step % window:
            return (new, step, rows), None
        older = event.slots - window
        due = importance(step - widen(new[0, :, :older]), longest[:, :older])
        newest_first = due.flip(1).argsort(dim=1, descending=True, stable=True)  # of equal ones the newest stay
        best = older - 1 - newest_first[:, : keep - window]
        recent = torch.arange(older, event.slots, device=best.device).expand(len(best), -1)
        slots = torch.cat([best.sort(1).values, recent], 1)
        return (new.gather(2, slots.expand(2, -1, -1)), step, rows), Keep(slots)


def importance(
    since: Int[Tensor, "kv_heads slots"], longest: Int[Tensor, "kv_heads slots"]
) -> Float[Tensor, "kv_heads slots"]:
    """How likely a token is due again, plus a bonus for short intervals; 0 where it never was activated.

    From float64, so that rounding does not part equal counts.
    """
    due = torch.sigmoid(-since.double() / longest)
    often = torch.sigmoid(1 - longest.double())
    return (2 * due + 2 * often).where(longest > 0, 0.0).float()
