"""What methods share that go on evicting while they decode."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, arange, dtype

from kvbench.cache.fork import Event
from kvbench.cache.layout import index_dtype
from kvbench.method import Method
from kvbench.plan import EXACT, LayerPlan, Plan, top_rows
from kvbench.prefill import Seen


def rolling_plan(method: Method, seen: Seen, rows: int, hold_positions: bool = False) -> Plan:
    """The tokens that a scorer keeps, `rows` for each KV head; the state is `rows`, so that steps hold as many."""
    scores = [method.scores(seen, layer) for layer in range(len(seen.layers))]
    routes = [top_rows(x, rows, method.protect) for x in scores]
    return Plan(tuple(LayerPlan((EXACT,), x, hold_positions=hold_positions, state=rows) for x in routes))


def lasting_dtype(seen: Seen) -> dtype:
    """The type of a position, or of a count of tokens, that will do however far the model goes on from here."""
    return index_dtype(seen.network.max_positions)


def grouped_weights(event: Event) -> Float[Tensor, "kv_heads group slots"]:
    """The new token's attention over the slots, the query heads of a KV head side by side."""
    return event.weights()[:, 0].unflatten(0, (len(event.key), -1))


def without(slot: Int[Tensor, "kv_heads 1"], slots: int) -> Int[Tensor, "kv_heads rest"]:
    """All of so many slots but one per KV head, in order."""
    rest = arange(slots - 1, device=slot.device)
    return rest + (rest >= slot)
