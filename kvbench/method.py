"""The interface of a compression method. One file in methods/ per method.

A method says what it needs to see, and plans; it never touches a cache, a hook or a model class. Most write one of:

- `scores`: the importance of each token; the default plan keeps the best ones, uniformly over layers and heads.
- `allocate`: how many rows each layer and KV head gets, for the scores of any other method (see `Wrapper`).
- `plan`: which tier each (layer, KV head, token) goes to, within the allowance.

Methods that act in time add `step` (edits while decoding) or `select` (which rows a query reads); `prefill` is a way of
their own to read the context.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.errors import UsageError
from kvbench.plan import Plan, equal_shares, keep_best, shrink
from kvbench.plugins import build_method

if TYPE_CHECKING:
    from kvbench.artefact import Calibration
    from kvbench.cache.fork import Edit, Event, Keep, Selection
    from kvbench.cache.packed import CompressedCache
    from kvbench.prefill import Reader, Seen, Statistic


class Axis(enum.Enum):
    """What a method's budget bounds."""

    HELD = "bytes held on the device"
    DEVICE = "bytes held on the device, the rest offloaded to the host"
    READ = "bytes read per decoding step"


class Base(enum.Enum):
    """What a share of the full cache is a share of, once a method that acts while decoding has read more tokens."""

    context = "the context: what is held never grows"
    seen = "all tokens seen so far, answers included"


class Positions(enum.Enum):
    """Where attention takes the rows of a cache to be."""

    original = "where they were read"
    contiguous = "next to each other, as if what is not read had never been there"


class Scale(enum.Enum):
    """What a scorer's numbers are good for."""

    mass = "non-negative, adds up over tokens, comparable over heads: a share of attention"
    rank = "only their order within a KV head counts"


class Trust(enum.Enum):
    """How far a method here is known to be the paper's."""

    published = "a published figure was re-made"
    parity = "the kept sets equal those of an independent reference"
    paper = "written from the paper's formulas"
    reconstructed = "details of the paper were inferred"


class Family(enum.Enum):
    reference = "a control"
    scorer = "scores tokens, keeps the best"
    allocator = "splits the budget over layers and KV heads, for any scorer"
    codec = "stores tokens in fewer bytes"
    router = "routes tokens among tiers"
    merging = "merges tokens"
    pattern = "keeps positions, whatever they hold"
    retrieval = "reads the part of the cache that a query asks for"


class Method:
    """A frozen dataclass; its fields are the options `method.<field>=` and part of a cell's identity.

    The docstring's first line says what it does and names the paper; the rest says what differs from it.
    """

    #: What `budget` bounds.
    axis: ClassVar[Axis] = Axis.HELD
    #: False: the budget is ignored, and a sweep over budgets holds this method once.
    budgeted: ClassVar[bool] = True
    #: What it is, how far to trust it, whether it looks at the last queries (and so at the question, if
    #: `protocol=aware`), and what a compressed context holds: columns of every list of methods.
    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.reconstructed
    query_aware: ClassVar[bool] = False
    holds: ClassVar[str] = "exact tokens"
    #: Of `scores`. A router that adds scores up wants `mass`; others reach it through `routers.as_mass`.
    scale: ClassVar[Scale] = Scale.rank
    #: Comes in a few sizes and takes the largest that fits, or needs some room for what is no row; others fill the
    #: budget to within a row per KV head.
    fixed_rate: ClassVar[bool] = False
    #: `prefill` replaces the shared one, and `plan` with it.
    own_prefill: ClassVar[bool] = False
    #: `step` is called after every token that comes after the context.
    steps: ClassVar[bool] = False
    #: `select` is asked before every read.
    selects: ClassVar[bool] = False
    #: Of methods that step or select: the budget holds at every step, as a share of this.
    budget_base: ClassVar[Base] = Base.context
    #: Contiguous positions ask for plans that keep every token or hold positions, and for tokens one at a time.
    positions: ClassVar[Positions] = Positions.original

    @property
    def one_by_one(self) -> bool:
        """Whether it must be fed tokens one at a time."""
        return self.steps or self.selects

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics to gather while the context is read; equal ones of different methods are gathered once."""
        return frozenset()

    @property
    def calibrations(self) -> frozenset[Calibration]:
        """What is fitted once per model, offline, and kept: `seen.artefacts`, or `reader.artefacts` in a prefill."""
        return frozenset()

    @property
    def protect(self) -> tuple[int, int]:
        """(first, last): how many of the first and last tokens are always kept, before any score counts."""
        return (0, 0)

    def protected(self, rows: int, tokens: int) -> tuple[int, int]:
        """What is left of `protect` where a KV head holds `rows` of `tokens` on average: at most half of them."""
        return shrink(self.protect, rows, tokens)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        """The importance of each token of a layer; the higher the better."""
        raise NotImplementedError(f"{type(self).__name__} has neither scores nor a plan of its own")

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        """How many of `rows` exact rows each KV head of each layer may hold: at most `rows` in all, at least one each.

        `rows` is never below one for each. The default is an equal share.
        """
        return equal_shares(seen, rows)

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        """Where every token goes. Raises `Infeasible` when even the smallest plan is over budget."""
        scores = [self.scores(seen, layer) for layer in range(len(seen.layers))]
        return keep_best(seen, scores, budget, self.allocate, self.protect)

    # -- methods that act in time ----------------------------------------------------------------------------------

    def prefill(self, reader: Reader, budget: Allowance) -> CompressedCache:
        """The compressed context, made while `reader.token_ids` are read (`own_prefill`). Raises `Infeasible`.

        Layers may end with different tokens, and the cache may be one of fewer tokens at positions of their own.
        """
        raise NotImplementedError

    def step(self, state: Any, event: Event) -> tuple[Any, Edit | Keep | None]:
        """After a layer has attended for one new token (`steps`): the next state, and an edit of the layer's rows.

        Pure: `state` (first `LayerPlan.state`) is never changed in place, so forks can share it.
        """
        raise NotImplementedError

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        """Before a layer attends for one new token (`selects`): the next state, and the rows that the token reads.

        Pure, as `step`. What is on the host is read only where it is fetched.
        """
        raise NotImplementedError


class Delegate(Method):
    """A method that asks another one, `inner`, for what it doesn't say itself."""

    @property
    def inner(self) -> Method:
        raise NotImplementedError

    @property
    def scale(self) -> Scale:  # type: ignore[override]
        return self.inner.scale

    @property
    def needs(self) -> frozenset[Statistic]:
        return self.inner.needs

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return self.inner.calibrations

    @property
    def protect(self) -> tuple[int, int]:
        return self.inner.protect

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        return self.inner.scores(seen, layer)

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        return self.inner.allocate(seen, scores, rows)


def check_scorer(method: Method, option: str) -> None:
    """Raises UsageError for a method that can't score tokens for another one."""
    if type(method).scores is Method.scores:
        raise UsageError(f"{option} scores no tokens; choose a scorer such as snapkv")
    if method.steps or method.positions is not Positions.original:
        raise UsageError(f"{option} only scores here: leave its decode and positions as they are")


@dataclass(frozen=True)
class Wrapper(Delegate):
    """A method over the scores of any other one, `base`."""

    base: str = "snapkv"
    base_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_scorer(self.scorer, f"method.base={self.base}")

    @cached_property
    def scorer(self) -> Method:
        return build_method(self.base, **self.base_options)

    @property
    def inner(self) -> Method:
        return self.scorer
