"""The interface of a compression method. One file in methods/ per method.

A method says what it needs to see, and plans; it never touches a cache, a hook or a model class. Most write one of:

- `scores`: the importance of each token; the default plan keeps the best ones, uniformly over layers and heads.
- `plan`: which tier each (layer, KV head, token) goes to, within the allowance.

Methods that act in time add `step` (edits while decoding), `select` (rows a query reads) or `read` (an own prefill).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.plan import Plan, keep_best

if TYPE_CHECKING:
    from kvbench.artefact import Calibration
    from kvbench.cache.fork import Edit, Event
    from kvbench.cache.packed import PackedLayer
    from kvbench.prefill import Reader, Seen, Statistic


class Axis(enum.Enum):
    """What a method's budget bounds."""

    HELD = "bytes held on the device"
    DEVICE = "bytes held on the device, the rest offloaded to the host"
    READ = "bytes read per decoding step"


class Method:
    """A frozen dataclass; its fields are the options `method.<field>=` and part of a cell's identity.

    The docstring's first line says what it does and names the paper; the rest says what differs from it.
    """

    #: What `budget` bounds.
    axis: ClassVar[Axis] = Axis.HELD
    #: False: the budget is ignored, and a sweep over budgets holds this method once.
    budgeted: ClassVar[bool] = True
    #: Scores are non-negative and add up over tokens (attention mass): what a utility router wants.
    additive: ClassVar[bool] = False
    #: `read` replaces the shared prefill.
    own_prefill: ClassVar[bool] = False
    #: `step` is called after every decoded token.
    steps: ClassVar[bool] = False
    #: `select` is asked before every read.
    selects: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics to gather while the context is read; equal ones of different methods are gathered once."""
        return frozenset()

    @property
    def calibration(self) -> Calibration | None:
        """What is fitted once per model, offline, and kept as an artefact; reaches `plan` as `seen.artefact`."""
        return None

    @property
    def protect(self) -> tuple[int, int]:
        """(first, last): how many of the first and last tokens are always kept, before any score counts."""
        return (0, 0)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        """The importance of each token of a layer; the higher the better."""
        raise NotImplementedError(f"{type(self).__name__} has neither scores nor a plan of its own")

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        """Where every token goes. Raises `Infeasible` when even the smallest plan is over budget."""
        return keep_best(seen, self.scores, budget, self.protect)

    # -- methods that act in time ----------------------------------------------------------------------------------

    def read(self, reader: Reader) -> Seen:
        """An own prefill (`own_prefill`): reads `reader.ids` layer by layer; layers may end with different tokens."""
        raise NotImplementedError

    def step(self, state: Any, event: Event) -> tuple[Any, Edit | None]:
        """After a layer has attended for new tokens (`steps`): the next state, and an edit of the layer's rows.

        Pure: `state` (first `LayerPlan.state`) is never changed in place, so forks can share it.
        """
        raise NotImplementedError

    def select(self, state: Any, query: Float[Tensor, "heads new dim"], packed: PackedLayer) -> Bool[Tensor, ...]:
        """Which context rows each query reads (`selects`): (kv_heads or heads, new, context rows)."""
        raise NotImplementedError
