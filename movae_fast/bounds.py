"""Define the range of values that a number may have, without importing anything slow."""

from __future__ import annotations

import math
from typing import NamedTuple


class Bounds(NamedTuple):
    """Describe the range of a number: from `least` to `most`, each included unless `above` or `below` excludes
    it."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # least itself is refused
    below: bool = False  # most itself is refused

    def refusal(self, value: float) -> str:
        """Return "" if the value is in the range, else a phrase that says what it must be, such as "must be
        positive"."""
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        if low and high and math.isfinite(value):
            return ""
        if math.isinf(self.most) and math.isinf(self.least):
            return "must be finite"
        first = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        if math.isinf(self.most) and isinstance(value, float):
            words = ("zero or more", "positive")[self.above] if self.least == 0 else first
            return f"must be {words} and finite"
        if math.isinf(self.most):
            return f"must be {first}"
        last = f"below {self.most:,.15g}" if self.below else f"at most {self.most:,.15g}"
        return f"must be {first} and {last}"
