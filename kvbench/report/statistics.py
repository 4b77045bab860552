"""Intervals, tests and corrections for scores of the same examples under several methods. Imports no torch.

Examples of one source document are not independent: what is drawn, flipped and counted are clusters (`cluster_id`),
within the strata (sub-tasks) that a task is made of. All functions take columns, one per cell and metric, because
cells that were asked the same examples share their resamples.

    clusters = Clusters(table.cluster_id, table.sub_task)
    found = interval(ours - theirs, clusters, np.random.default_rng(0))    # Interval(mean=-0.12, low=-0.21, ...)
    p = p_values((ours - theirs)[:, None], clusters, rng, tests=12).p      # two-sided
    holm(p)                                                                # of a declared family
    noninferior(ours - theirs, clusters, rng, margin=0.01).holds           # of losses
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kvbench.errors import UsageError

FEW = 30  # clusters: below, t intervals
MANY = 5000  # clusters: above, bootstrap and t are the same, and t is at once there
RESAMPLES = 4000  # of a bootstrap; the ends of an interval then move by some 2 % of its width from seed to seed

Side = Literal["both", "less", "greater"]


class Clusters:
    """Which examples belong together: a cluster each, clusters in strata.

    `strata` are the examples' sub-tasks. Strata that share a cluster can't vary apart and are taken as one; strata of
    a single cluster say nothing of how clusters vary, and are pooled (a lone one with the smallest other): the
    interval then gets wider, not narrower.
    """

    def __init__(self, ids: Sequence[str] | ndarray, strata: Sequence[str] | ndarray | None = None) -> None:
        self.of = np.unique(np.asarray(ids, dtype=str), return_inverse=True)[1]
        self.sizes = np.bincount(self.of).astype(float)
        self.n, self.count = len(self.of), len(self.sizes)
        self.stratum = _strata(self.of, ["" for _ in self.of] if strata is None else strata)
        self.strata = int(self.stratum.max(initial=-1)) + 1

    @property
    def few(self) -> bool:
        return self.count < FEW

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return self.count - self.strata

    def totals(self, values: Float[ndarray, "examples columns"]) -> Float[ndarray, "clusters columns"]:
        """The sum of each cluster's examples."""
        adding = coo_array((np.ones(self.n), (self.of, np.arange(self.n))), shape=(self.count, self.n)).tocsr()
        return adding @ values


def _strata(of: Int[ndarray, " examples"], strata: Sequence[str] | ndarray) -> Int[ndarray, " clusters"]:
    names = np.unique(np.asarray(strata, dtype=str), return_inverse=True)[1]
    count = int(of.max(initial=-1)) + 1
    nodes = count + int(names.max(initial=-1)) + 1
    links = coo_array((np.ones(len(of)), (of, count + names)), shape=(nodes, nodes))
    parts = connected_components(links, directed=False)[1][:count]
    sizes = np.bincount(parts, minlength=1)
    alone = np.flatnonzero(sizes == 1)
    if len(alone) == 1 and len(sizes) > 1:
        alone = np.append(alone, np.where(sizes > 1, sizes, count + 1).argmin())
    merged = np.where(np.isin(parts, alone), alone[0], parts) if len(alone) else parts
    return np.unique(merged, return_inverse=True)[1]


@dataclass(frozen=True)
class Interval:
    """A mean over examples, or a mean paired difference, and where it may lie.

    `made`: "bootstrap"; "t" (fewer than 30 clusters, or more than 5,000); "exact" where all clusters agree; "none"
    where there is one cluster: then the ends are NaN.
    """

    mean: float
    low: float
    high: float
    error: float  # standard error, cluster-robust
    n: int
    clusters: int
    freedom: int
    made: str

    @property
    def few(self) -> bool:
        """Fewer than 30 clusters: the interval rests on the differences being near normal."""
        return self.clusters < FEW


def intervals(
    values: Float[ndarray, "examples columns"],
    clusters: Clusters,
    rng: np.random.Generator,
    level: float = 0.95,
    bounds: tuple[float, float] | Float[ndarray, "2 columns"] = (-math.inf, math.inf),
    resamples: int = RESAMPLES,
) -> list[Interval]:
    """The mean of each column with its two-sided interval; for the one-sided bounds at 95 % take `level=0.9`.

    From 30 clusters on: a bootstrap of clusters within strata. Of a stratum's m clusters m - 1 are drawn with
    replacement, which makes the variance unbiased however small the strata are (Rao and Wu, JASA 83, 1988), while the
    mix of strata stays as it is. Its percentiles are those at which a normal distribution has the tails of t
    (Hesterberg, The American Statistician 69, 2015: "expanded percentile"). Not BCa: its acceleration is unstable
    where most differences are 0, it too is too narrow with few clusters, and strata are not foreseen.

    Fewer: t with the standard error of `errors` and clusters - strata degrees of freedom; `few` is then true.

    Where all clusters (of a stratum) have the same mean nothing varies, and a width of 0 would be a lie. If so large a
    share of other clusters existed that m draws miss it only with probability (1 - level) / 2, the mean would be off by
    at most that share of the way to `bounds` (what values can be): the exact binomial bound at 0 of m. Without bounds:
    the value.
    """
    means, spread = values.mean(0), errors(values, clusters)
    sizes = (clusters.n, clusters.count, clusters.freedom)
    if clusters.freedom < 1:
        return [Interval(float(mean), math.nan, math.nan, math.nan, *sizes, "none") for mean in means]
    tail = (1 - level) / 2
    t = float(stats.t.isf(tail, clusters.freedom))
    if FEW <= clusters.count <= MANY:
        made = "bootstrap"
        low, high = _bootstrap(clusters.totals(values), clusters, rng, resamples, float(stats.norm.sf(t)))
    else:
        made = "t"
        low, high = means - t * spread, means + t * spread
    least, most = np.broadcast_to(np.asarray(bounds, dtype=float).reshape(2, -1), (2, len(means)))
    same, missed = spread == 0, 1 - tail ** (1 / clusters.count)
    low = np.where(same, means - np.where(np.isfinite(least), means - least, 0) * missed, low).clip(least, most)
    high = np.where(same, means + np.where(np.isfinite(most), most - means, 0) * missed, high).clip(least, most)
    columns = zip(means, low, high, spread, same, strict=True)
    return [
        Interval(float(mean), float(start), float(end), float(error), *sizes, "exact" if one else made)
        for mean, start, end, error, one in columns
    ]


def interval(
    values: Float[ndarray, " examples"],
    clusters: Clusters,
    rng: np.random.Generator,
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """`intervals` of one column."""
    return intervals(values[:, None], clusters, rng, level, bounds)[0]


def errors(values: Float[ndarray, "examples columns"], clusters: Clusters) -> Float[ndarray, " columns"]:
    """The cluster-robust standard error of each column's mean (NaN with one cluster).

    The linearised variance of a stratified mean of clusters (Cochran, Sampling Techniques, 1977, ch. 5A and 9A): the
    squares of the clusters' summed deviations from their stratum's mean, each over one less its share of the stratum
    (Bell and McCaffrey, Survey Methodology 28, 2002: "CR2"), which for equal sizes is m / (m - 1). What is left of
    rounding is 0.
    """
    if clusters.freedom < 1:
        return np.full(values.shape[1], np.nan)
    rest, shares = _deviations(clusters.totals(values), clusters)
    found = np.sqrt((rest**2 / (1 - shares)[:, None]).sum(0)) / clusters.n
    return np.where(found > 1e-12 * np.abs(values).max(0), found, 0.0)


def _deviations(
    totals: Float[ndarray, "clusters columns"], clusters: Clusters
) -> tuple[Float[ndarray, "clusters columns"], Float[ndarray, " clusters"]]:
    """Each cluster's sum less what its stratum's mean makes of its size, and its share of the stratum's examples."""
    adding, parts = np.eye(clusters.strata)[:, clusters.stratum], clusters.stratum
    sizes = adding @ clusters.sizes
    rest = totals - clusters.sizes[:, None] * ((adding @ totals) / sizes[:, None])[parts]
    return rest, clusters.sizes / sizes[parts]


def _bootstrap(
    totals: Float[ndarray, "clusters columns"],
    clusters: Clusters,
    rng: np.random.Generator,
    resamples: int,
    tail: float,
) -> Float[ndarray, "2 columns"]:
    """The percentiles `tail` and `1 - tail` of resampled means. Counts of drawn clusters times the clusters' sums."""
    draws = np.zeros((resamples, clusters.count))
    for stratum in range(clusters.strata):
        mine = np.flatnonzero(clusters.stratum == stratum)
        counts = rng.multinomial(len(mine) - 1, np.full(len(mine), 1 / len(mine)), size=resamples)
        sizes = clusters.sizes[mine]
        draws[:, mine] = counts * (sizes.sum() / clusters.n / (counts @ sizes))[:, None]
    found = np.empty((2, totals.shape[1]))
    for start in range(0, totals.shape[1], 256):  # columns, so that their resamples fit in memory
        block = slice(start, start + 256)
        found[:, block] = np.quantile(totals[:, block].T @ draws.T, (tail, 1 - tail), axis=1)
    return found


# -- tests --


@dataclass(frozen=True)
class PValues:
    """`p` of each column, and by what test: "mcnemar", "flips" or "t"."""

    p: Float[ndarray, " columns"]
    test: list[str]


def p_values(
    differences: Float[ndarray, "examples columns"],
    clusters: Clusters,
    rng: np.random.Generator,
    side: Side = "both",
    tests: int = 1,
    resamples: int | None = None,
    alpha: float = 0.05,
) -> PValues:
    """Whether each column's mean difference is 0; `side="less"` asks whether it is below 0, "greater" above.

    - Differences in {-1, 0, 1}, an example per cluster: exact McNemar, whatever the number of clusters.
    - 30 clusters or more: signs of clusters flipped at random. If the methods are exchangeable, a cluster's sum is as
      likely negative; the statistic is the mean, p = (1 + as extreme) / (1 + resamples) (Phipson and Smyth, SAGMB 9,
      2010). With binary scores and several examples per cluster this is McNemar's test of clusters.
    - Fewer: t of the cluster-robust standard error, as the interval's; where nothing varies what all flips give,
      2^-clusters for a side. Binary scores too, where clusters have several examples: McNemar's test would take them
      for independent.

    `tests` is how many p-values a correction will be over: the smallest p that flips can give, 1 / (1 + resamples),
    must then be at most alpha / tests, or UsageError says how many resamples are needed (default: so many, and no
    fewer than 9,999). To test non-inferiority in such a family, give differences less the margin, `side="less"`.
    """
    needed = resamples_needed(tests, alpha)
    resamples = max(9_999, needed) if resamples is None else resamples
    p = np.full(differences.shape[1], np.nan)
    exact = np.asarray(np.isin(differences, (-1, 0, 1)).all(0) & (clusters.n == clusters.count))
    p[exact] = mcnemar((differences[:, exact] > 0).sum(0), (differences[:, exact] < 0).sum(0), side)
    rest = np.flatnonzero(~exact)
    if not clusters.few and len(rest):
        if resamples < needed:
            raise UsageError(
                f"{resamples} resamples give no p-value below {1 / (resamples + 1):.2g}, and {tests} tests ask for "
                f"{alpha / tests:.2g}: use {needed} resamples or more"
            )
        p[rest] = _flipped(clusters.totals(differences[:, rest]), clusters, rng, side, resamples)
    elif clusters.freedom > 0:
        p[rest] = _t_test(differences[:, rest], clusters, side)
    return PValues(p, ["mcnemar" if one else "t" if clusters.few else "flips" for one in exact])


def resamples_needed(tests: int, alpha: float = 0.05) -> int:
    """How many resamples can give a p-value that survives Holm's or Benjamini-Hochberg's first step."""
    return math.ceil(tests / alpha - 1e-9) - 1


def mcnemar(
    ours: Int[ndarray, " columns"], theirs: Int[ndarray, " columns"], side: Side = "both"
) -> Float[ndarray, " columns"]:
    """Exact McNemar: are examples that only we get right (`ours`) as many as those that only they do (`theirs`)?

    The binomial test of the discordant pairs (McNemar, Psychometrika 12, 1947); valid for independent examples.
    """
    both = ours + theirs
    less, greater = stats.binom.cdf(ours, both, 0.5), stats.binom.sf(ours - 1, both, 0.5)
    return _sided(less, greater, side)


def _flipped(
    totals: Float[ndarray, "clusters columns"],
    clusters: Clusters,
    rng: np.random.Generator,
    side: Side,
    resamples: int,
) -> Float[ndarray, " columns"]:
    """Strata keep their own levels, about the common mean: only the mean is 0 under the hypothesis. The deviations
    are then scaled for the levels that were estimated; with one stratum these are the sums themselves."""
    seen = totals.sum(0)
    scale = math.sqrt((clusters.count - 1) / clusters.freedom)
    sums = clusters.sizes[:, None] * seen / clusters.n + scale * _deviations(totals, clusters)[0]
    slack = 1e-9 * np.abs(sums).sum(0)  # equal sums, added up in another order
    less, greater, far = np.zeros((3, len(seen)))
    for start in range(0, resamples, 2000):
        rows = min(2000, resamples - start)
        signs = 2.0 * rng.integers(2, size=(rows, clusters.count), dtype=np.int8) - 1
        flipped = signs @ sums
        less += (flipped <= seen + slack).sum(0)
        greater += (flipped >= seen - slack).sum(0)
        far += (np.abs(flipped) >= np.abs(seen) - slack).sum(0)
    return (1 + {"less": less, "greater": greater, "both": far}[side]) / (1 + resamples)


def _t_test(
    differences: Float[ndarray, "examples columns"], clusters: Clusters, side: Side
) -> Float[ndarray, " columns"]:
    means, spread, totals = differences.mean(0), errors(differences, clusters), clusters.totals(differences)
    t = np.divide(means, spread, out=np.zeros_like(means), where=spread > 0)
    less, greater = stats.t.cdf(t, clusters.freedom), stats.t.sf(t, clusters.freedom)
    least = 0.5 ** (totals != 0).sum(0)
    less = np.where(spread > 0, less, np.where(means < 0, least, 1.0))
    greater = np.where(spread > 0, greater, np.where(means > 0, least, 1.0))
    return _sided(less, greater, side)


def _sided(
    less: Float[ndarray, " columns"], greater: Float[ndarray, " columns"], side: Side
) -> Float[ndarray, " columns"]:
    return {"less": less, "greater": greater, "both": np.minimum(1, 2 * np.minimum(less, greater))}[side]


def holm(p: Float[ndarray, " tests"]) -> Float[ndarray, " tests"]:
    """p-values adjusted so that, at 5 %, any false claim in the family is made in 5 % of studies (Holm, 1979).

    NaNs are no tests, and stay.
    """
    found, told = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = told[np.argsort(p[told], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(1, np.maximum.accumulate(steps))
    return found


def benjamini_hochberg(p: Float[ndarray, " tests"]) -> Float[ndarray, " tests"]:
    """p-values adjusted so that, at 5 %, 5 % of what is claimed is false on average (Benjamini and Hochberg, 1995).

    For independent or positively dependent tests, which cells of the same examples are. NaNs are no tests, and stay.
    """
    found, told = np.full(len(p), np.nan), ~np.isnan(p)
    if told.any():
        found[told] = stats.false_discovery_control(p[told])
    return found


@dataclass(frozen=True)
class NonInferiority:
    """`bound`: the one-sided 95 % upper bound of how much worse we are; `holds`: by less than the margin."""

    bound: float
    holds: bool


def noninferior(
    differences: Float[ndarray, " examples"],
    clusters: Clusters,
    rng: np.random.Generator,
    margin: float | Float[ndarray, " examples"],
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> NonInferiority:
    """Whether losses are worse by less than `margin`, at 5 % one-sided. `differences`: ours less theirs; of scores,
    where more is better, theirs less ours.

    `margin` was stated beforehand: a number, or a value for each example, such as a share of its gap to the full cache.
    The mean of such values is itself measured. So what is held against 0 is the upper end of the 90 % interval of the
    differences less the margin, which has the noise of both.
    """
    least, most = bounds[0] - np.max(margin), bounds[1] - np.min(margin)
    ends = np.array([[bounds[0], least], [bounds[1], most]])
    both = np.stack([differences, differences - margin], axis=1)
    plain, less = intervals(both, clusters, rng, level=0.9, bounds=ends)
    return NonInferiority(plain.high, less.high < 0)


def smallest_difference(error: float, freedom: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that so noisy a comparison shows with this power, two-sided: (t + t) * error.

    NaN where nothing varied, which says nothing of how much it could have.
    """
    if freedom < 1 or not error > 0:
        return math.nan
    return _noncentral(freedom, power, alpha) * error


@cache
def _noncentral(freedom: int, power: float, alpha: float) -> float:
    return float(stats.t.isf(alpha / 2, freedom) + stats.t.ppf(power, freedom))


def win_tie_loss(
    differences: Float[ndarray, "examples columns"], better: Literal["higher", "lower"] = "higher"
) -> Int[ndarray, "3 columns"]:
    """On how many examples we are better, equal, worse."""
    sign = np.sign(differences) * (1 if better == "higher" else -1)
    return np.stack([(sign > 0).sum(0), (sign == 0).sum(0), (sign < 0).sum(0)])
