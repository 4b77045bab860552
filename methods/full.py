"""The full cache."""

from dataclasses import dataclass
from typing import ClassVar

from kvbench.budget import Allowance
from kvbench.method import Family, Method, Trust
from kvbench.plan import Plan, keep_all
from kvbench.prefill import Seen


@dataclass(frozen=True)
class Full(Method):
    """Keep every token exact: the reference, through the same code as every method; ignores the budget."""

    family: ClassVar[Family] = Family.reference
    trust: ClassVar[Trust] = Trust.parity
    budgeted: ClassVar[bool] = False

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        return keep_all(seen)
