"""TurboQuant."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kvbench.budget import Allowance
from kvbench.cache.codecs.rotated import Rotated, lloyd_max, random_rotation
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import LayerPlan, Plan, Tier, keep_all
from kvbench.prefill import Seen
from kvbench.toolbox.sizes import first_fitting


@dataclass(frozen=True)
class TurboQuant(Method):
    """Rotate each key and value at random, then the best scalar quantiser (Zandieh et al., arXiv 2504.19874, sec. 3.1).

    The form with the least mean square error, 1 to 4 bits a coordinate and a 16-bit norm a vector; every token, keys
    as attention sees them. The rotation is drawn once per model, from `seed`. `bits` unset: exact if the budget allows,
    else as many bits as it allows. Differs: no QJL residual (unbiased, but softmax suffers more from its variance), no
    half bits for outlier channels; acts once, the tokens that follow stay exact.
    """

    family: ClassVar[Family] = Family.codec
    trust: ClassVar[Trust] = Trust.parity
    holds: ClassVar[str] = "every token in 1 to 4 bits"
    fixed_rate: ClassVar[bool] = True

    bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (None, 1, 2, 3, 4):
            raise UsageError(f"method.bits={self.bits} is not one of 1, 2, 3, 4, or null: as the budget allows")

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        return first_fitting(seen, budget, self._plans(seen))

    def _plans(self, seen: Seen) -> Iterator[Plan]:
        """From the largest to the smallest."""
        exact = keep_all(seen)
        if self.bits is None:
            yield exact
        rotations = {x: random_rotation(seen.dim, self.seed).to(x) for x in seen.network.devices}
        for bits in (4, 3, 2, 1) if self.bits is None else (self.bits,):
            codecs = {x: Rotated(bits, y, lloyd_max(bits, seen.dim).to(x)) for x, y in rotations.items()}
            tiers = {x: Tier(f"{bits}-bit", codec, codec) for x, codec in codecs.items()}
            yield Plan(tuple(LayerPlan((tiers[x.route.device],), x.route) for x in exact.layers))
