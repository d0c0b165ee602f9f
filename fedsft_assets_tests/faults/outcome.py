"""What came of the faults of a campaign, and its totals: one line a target."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from fedsft_assets_tests.faults.faults import Kind, Target


class Verdict(StrEnum):
    """Of an execution, and so of all its faults."""

    RECOVERED = "recovered"
    """It ended with what an execution without faults gives, to the bit."""
    REFUSED = "refused"
    """The same, after an error that says what is wrong, and what to do about it."""
    WRONG = "wrong"
    """Anything else."""
    TOO_LONG = "too long"
    """It waited longer than the settings say."""


_Line = tuple[str, Target, Kind]  # the runtime, and what was hit how
_COLUMNS = "{:<12}{:<18}{:<9}" + "{:>10}" * (1 + len(Verdict))


@dataclass
class Outcome:
    """`injected` are faults that hit, `judged` those of them whose execution has ended, `wrong` says what was wrong."""

    injected: Counter[_Line] = field(default_factory=Counter)
    judged: Counter[tuple[_Line, Verdict]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        self.injected += other.injected
        self.judged += other.judged
        self.wrong += other.wrong

    def count(self, verdict: Verdict) -> int:
        return sum(count for (_, found), count in self.judged.items() if found == verdict)

    @property
    def table(self) -> str:
        """Totals by runtime, target and kind."""
        lines = [_COLUMNS.format("runtime", "target", "kind", "injected", *Verdict)]
        for line in sorted(self.injected):
            counts = [self.judged[line, verdict] for verdict in Verdict]
            lines.append(_COLUMNS.format(*line, self.injected[line], *counts))
        counts = [self.count(verdict) for verdict in Verdict]
        return "\n".join([*lines, _COLUMNS.format("all", "", "", self.injected.total(), *counts)])
