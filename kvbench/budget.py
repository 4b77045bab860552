"""How much a cell may hold for its context: `0.1`, `64MiB`, or a paper's nominal `0.9r` / `128tok`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from kvbench.errors import UsageError

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_FORM = re.compile(r"(\d+\.?\d*(?:[eE][-+]?\d{1,2})?|\.\d+)\s*([A-Za-z]*)")
_HELP = "use a share of the full cache (0.1), bytes (64MiB), or nominally the share removed (0.9r) or tokens (128tok)"


@dataclass(frozen=True)
class Allowance:
    """A budget made concrete for one context.

    `limit` is in bytes. A true budget (`nominal=False`) bounds everything held: payload and metadata. A nominal one
    bounds the payload alone: it stands for "as many bytes as this many exact tokens", the way papers count.
    Where a share is one of all tokens seen so far (`Base.seen`), it grows while decoding: see `at`.
    """

    limit: int
    nominal: bool = False
    tokens: int = 0  # of the context
    per_token: Fraction = Fraction(0)  # bytes by which a share grows with each token after it

    def charged(self, payload: int, metadata: int) -> int:
        """What of a plan's bytes counts against `limit`."""
        return payload if self.nominal else payload + metadata

    def at(self, tokens: int) -> int:
        """The limit once so many tokens have been seen, where the budget's base is all of them."""
        return self.limit + math.floor(self.per_token * (tokens - self.tokens))


@dataclass(frozen=True)
class Budget:
    """A parsed budget. `amount` is exact (a fraction), so that 0.1 of a cache is the same number everywhere."""

    amount: Fraction
    unit: str  # "" share of the full cache | "B" bytes | "r" share of tokens removed | "tok" tokens per KV head

    @classmethod
    def parse(cls, text: str | float | int) -> Budget:
        """Raises UsageError for a budget that is not positive, not a budget, or a share above 1."""
        form = _FORM.fullmatch(str(text).strip())
        if not form:
            raise UsageError(f"budget={text} is not a budget: {_HELP}")
        amount, unit = Fraction(form[1]), form[2]
        if unit in _UNITS:
            amount, unit = amount * _UNITS[unit], "B"
        if unit not in ("", "B", "r", "tok"):
            raise UsageError(f"budget={text} has an unknown unit: {_HELP}")
        if unit == "r" and not amount < 1:
            raise UsageError(f"budget={text} removes every token: {_HELP}")
        if unit != "r" and amount <= 0:
            raise UsageError(f"budget={text} is not above zero: {_HELP}")
        if unit == "" and amount > 1:
            raise UsageError(f"budget={text} is more than the full cache (1); bytes need a unit, as in {text}MiB")
        return cls(amount, unit)

    @property
    def nominal(self) -> bool:
        return self.unit in ("r", "tok")

    def __str__(self) -> str:
        """The normalised form: equal budgets print alike (`0.10` and `1e-1` are `0.1`; `1MiB` is `1048576B`)."""
        number = str(self.amount.numerator) if self.amount.denominator == 1 else f"{float(self.amount):.10g}"
        return number + self.unit

    def allow(self, full_bytes: int, tokens: int) -> Allowance:
        """The allowance for a context of `tokens` tokens whose exact cache holds `full_bytes`."""
        if self.unit == "B":
            return Allowance(int(self.amount))
        if self.unit == "":
            return Allowance(int(self.amount * full_bytes), False, tokens, self.amount * full_bytes / tokens)
        row = full_bytes // tokens
        if self.unit == "tok":
            return Allowance(row * min(int(self.amount), tokens), nominal=True)
        return Allowance(row * (tokens - int(self.amount * tokens)), True, tokens, row * (1 - self.amount))
