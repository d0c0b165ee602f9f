"""One sentence for each pair of jobs: better, worse, or not decidable with these data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedsft_assets.evaluation.statistics.intervals import LEVEL, Estimate, Pair
from fedsft_assets.evaluation.statistics.power import MOST_RECORDS, MOST_SEEDS, Needed, detectable, needed
from fedsft_assets.specs.job import JobKind

LEAST_PROMPTS = 10
BUDGET_TOLERANCE = 0.05

Outcome = Literal["better", "worse", "not decidable"]


@dataclass(frozen=True)
class Verdict:
    """What is known of job against other, when as many pairs are judged at once as `pairs` says.

    `p_value` is corrected for them (Holm): where nothing differs, any verdict but "not decidable" among all pairs has a
    probability of at most 5 %. `detectable` is the smallest difference in nats a token that these data find four times
    in five, `needed` what would find the one that was seen.
    """

    job: str
    other: str
    outcome: Outcome
    estimate: Estimate
    p_value: float
    pairs: int
    detectable: float
    needed: Needed

    @property
    def sentence(self) -> str:
        if self.outcome == "not decidable":
            return f"{self.job} and {self.other}: not decidable with these data: {self._why()}"
        value = abs(self.estimate.value)
        low, high = sorted((abs(self.estimate.low), abs(self.estimate.high)))
        say = _format(high - low)
        direction = "lower" if self.outcome == "better" else "higher"
        return (
            f"{self.job} is {self.outcome} than {self.other}: test loss {direction} by {say(value)} nats a token"
            f" (95 % interval {say(low)} to {say(high)}; {self._basis()})"
        )

    def _why(self) -> str:
        found, say = self.estimate, _format(self.estimate.high - self.estimate.low)
        if found.parts.clusters < LEAST_PROMPTS:
            return f"{found.parts.clusters} prompts are too few for an interval; it takes at least {LEAST_PROMPTS}"
        if not math.isfinite(found.high - found.low):
            return (
                f"a few of the {found.parts.clusters} prompts have most of the answer tokens: too few for an interval"
            )
        if found.value == 0 and found.parts.variance == 0:
            return f"both have the same loss on all {found.records:,} records"
        also = f"; that leaves out 0, but {self.pairs} pairs are judged at once" if found.low * found.high > 0 else ""
        return (
            f"the difference is {say(found.value)} nats a token (95 % interval {say(found.low)} to {say(found.high)};"
            f" {self._basis()}{also}); {self._remedy()}"
        )

    def _basis(self) -> str:
        """The records, and the seeds of each job that has any."""
        records = f"{self.estimate.records:,} records"
        seeds = {name: n for name, n in zip((self.job, self.other), self.estimate.seeds, strict=True) if n}
        counts = set(seeds.values())
        if not counts:
            return records
        if counts == {1}:
            return f"{records}; one seed, so another training may differ"
        if len(counts) == 1:
            return f"{records}, {counts.pop()} seeds"
        each = " and ".join(f"{n} of {name}" for name, n in seeds.items())
        return f"{records}; seeds: {each}"

    def _remedy(self) -> str:
        if self.needed.records is not None and self.needed.records <= self.estimate.records:
            return "a few records more may do"
        if self.needed.records is not None:
            return f"it would take about {_rounded(self.needed.records):,} records"
        if self.needed.seeds is not None:
            return f"no number of records would do with these seeds; it would take about {self.needed.seeds} seeds"
        if self.estimate.parts.seeds:
            return f"neither {MOST_RECORDS:,} records nor {MOST_SEEDS} seeds would do alone"
        return f"it would take more than {MOST_RECORDS:,} records"


def pairs_that_matter(kinds: Mapping[str, JobKind], base: str) -> list[Pair]:
    """Each federated job against each local one, the centralized ones and the base model; `kinds` are of the jobs."""
    others = [job for kind in ("local", "centralized") for job in sorted(kinds) if kinds[job] == kind]
    federated = [job for job in sorted(kinds) if kinds[job] == "federated"]
    return [(job, other) for job in federated for other in (*others, base)]


def judge(estimates: Mapping[Pair, Estimate]) -> list[Verdict]:
    """A verdict for each pair, in their order, corrected for how many there are."""
    enough = [found.parts.clusters >= LEAST_PROMPTS for found in estimates.values()]
    p_values = holm([found.p_value for found in estimates.values()])
    level = LEVEL / max(len(estimates), 1)
    verdicts = []
    for (job, other), found, decidable, p_value in zip(estimates, estimates.values(), enough, p_values, strict=True):
        outcome: Outcome = "not decidable"
        if decidable and p_value <= LEVEL and found.value != 0:
            outcome = "better" if found.value < 0 else "worse"
        least = detectable(found.parts, level)
        takes = needed(found.parts, found.records, level)
        verdicts.append(Verdict(job, other, outcome, found, p_value, len(estimates), least, takes))
    return verdicts


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in their order (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def unequal_budgets(tokens: Mapping[str, int], pairs: Sequence[Pair], tolerance: float = BUDGET_TOLERANCE) -> list[str]:
    """A sentence for each pair of jobs whose answer tokens trained on differ by more than `tolerance` of the smaller.

    A job that `tokens` does not have, as the base model, has no budget.
    """
    sentences = []
    for pair in pairs:
        budgets = [tokens[job] for job in pair if job in tokens]
        if len(budgets) < 2 or max(budgets) <= min(budgets) * (1 + tolerance):
            continue
        more, less = sorted(pair, key=lambda job: -tokens[job])
        by = f"{tokens[more] / tokens[less] - 1:.0%}".replace("%", " %") if tokens[less] else "everything"
        sentences.append(
            f"{more} trained on {by} more answer tokens than {less} ({tokens[more]:,} and {tokens[less]:,}):"
            " their difference is also one of budgets"
        )
    return sentences


def _format(width: float) -> Callable[[float], str]:
    """Writes numbers with as many decimals as show two digits of an interval's half width."""
    half = width / 2
    decimals = min(max(1 - math.floor(math.log10(half)), 2), 6) if 0 < half < math.inf else 4

    def say(value: float) -> str:
        text = f"{value:.{decimals}f}"
        return text.replace("-", "−") if float(text) else text.lstrip("-")

    return say


def _rounded(number: int) -> int:
    """To two digits: more is not known."""
    scale = 10 ** max(len(str(number)) - 2, 0)
    return -(-number // scale) * scale
