"""Expected attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.rope import unrotate
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Observed, Seen, Statistic


@dataclass(frozen=True)
class QueryMoments(Statistic):
    """(mean, covariance) of each head's queries but the first `skip`: before their rotary embedding, times the scale.

    Merged chunk by chunk around the mean, so that float32 does.
    """

    skip: int

    def observe(self, state: tuple[int, Tensor, Tensor] | None, seen: Observed) -> tuple[int, Tensor, Tensor]:
        assert seen.rope is not None
        heads, new, dim = seen.query.shape
        device = seen.query.device
        state = state or (0, torch.zeros(heads, dim, device=device), torch.zeros(heads, dim, dim, device=device))
        count, mean, scatter = state
        for start in range(max(min(self.skip, seen.total - 1) - seen.start, 0), new, 4096):
            part = seen.query[:, start : start + 4096]
            at = seen.start + start + torch.arange(part.shape[1], device=device)
            query = unrotate(part, *seen.rope(at)) * seen.scale
            shift = query.mean(1) - mean
            off = query - query.mean(1, keepdim=True)
            share = part.shape[1] / (count + part.shape[1])
            mean = mean + shift * share
            scatter = scatter + off.mT @ off + shift[:, :, None] * shift[:, None] * (count * share)
            count += part.shape[1]
        return count, mean, scatter

    def finish(self, values: tuple[tuple[int, Tensor, Tensor], ...], seen: Seen) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple((mean, scatter / count) for count, mean, scatter in values)


@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Keep what queries still to come are expected to attend to (Devoto et al., arXiv 2510.00636).

    Queries are taken to be Gaussian, with the context's moments, at the next `future` positions on average; a key's
    expected weight is multiplied by its value's norm. Differs: first tokens (`sinks`) count as much as the best other
    one, for methods that compare scores. `epsilon` is added to the expected weights (the authors use 0.01 with AdaKV).
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    scale: ClassVar[Scale] = Scale.mass

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0
    value_norm: bool = True

    def __post_init__(self) -> None:
        if self.future < 1 or self.sinks < 0:
            raise UsageError(f"method.future={self.future} method.sinks={self.sinks}: at least 1 and 0")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({QueryMoments(self.sinks)})

    @property
    def protect(self) -> tuple[int, int]:
        return (self.sinks, 0)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        x = seen.layers[layer]
        kv_heads, tokens, _ = x.key.shape
        sinks = min(self.sinks, tokens - 1)
        mean, covariance = (m.unflatten(0, (kv_heads, -1)) for m in self._ahead(seen, layer))
        key = x.key[:, sinks:].float()
        # One query head of each group at a time: the log of E[exp(q.k)] over Gaussian queries, then its softmax.
        weights = [
            ((key @ mu[..., None])[..., 0] + ((key @ sigma) * key).sum(-1) / 2).softmax(-1)
            for mu, sigma in zip(mean.unbind(1), covariance.unbind(1), strict=True)
        ]
        score = torch.stack(weights).mean(0) + self.epsilon
        if self.value_norm:
            score = score * x.value[:, sinks:].float().norm(dim=-1)
        return torch.cat([score.amax(1, keepdim=True).expand(-1, sinks), score], 1)

    def _ahead(self, seen: Seen, layer: int) -> tuple[Float[Tensor, "heads dim"], Float[Tensor, "heads dim dim"]]:
        """The queries' moments under the mean rotation of the next positions."""
        mean, covariance = seen.statistics[QueryMoments(self.sinks)][layer]
        at = torch.arange(seen.next_position, seen.next_position + self.future, device=mean.device)
        cos, sin = (x.mean(0) for x in seen.network.rope(at))
        unit = torch.eye(len(cos), device=mean.device)
        first, second = unit.chunk(2, dim=-1)
        rotation = unit * cos + torch.cat([-second, first], -1) * sin  # row i is where dimension i goes
        return mean @ rotation, rotation.mT @ covariance @ rotation
