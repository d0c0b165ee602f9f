"""How alike the work of the overhead benchmark's contenders must be: nobody may do less."""

from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.data import BenchmarkError
from benchmarks.overhead.contenders import PLAIN, Run
from benchmarks.overhead.input import Input

_AT_FIRST = 1e-3  # of a loss, relative where it is above 1: the base model's is the same for all
_AFTER_ROUNDS = 1e-2


def require_equal_work(given: Input, runs: Mapping[str, Sequence[Run]]) -> None:
    """Every run trained what the input says and scored every model, with about equal losses.

    Raises BenchmarkError that names the first difference.
    """
    part = given.part
    steps = {
        (site.site, round): (len(batches), sum(site.rows.answers(index) for batch in batches for index in batch))
        for site in map(given.site, given.sites)
        for round, batches in enumerate(site.batches)
    }
    validation = given.validation()
    answers = sum(map(validation.answers, range(len(validation.ids))))
    scores = {(site, round): answers for site in given.sites for round in range(part.rounds + 1)}
    reference = PLAIN if PLAIN in runs else next(iter(runs))
    losses = {(one.site, one.round): one.loss for one in runs[reference][0].scored}
    for name, tries in runs.items():
        for run in tries:
            _require(name, "training", steps, {(one.site, one.round): (one.steps, one.tokens) for one in run.trained})
            _require(name, "validation", scores, {(one.site, one.round): one.tokens for one in run.scored})
            _require_once(name, run)
            for one in run.scored:
                tolerance = _AT_FIRST if one.round == 0 else _AFTER_ROUNDS
                expected = losses[one.site, one.round]
                # Written so that a loss that is not a number is unequal too.
                if not abs(one.loss - expected) <= tolerance * max(1.0, abs(expected)):
                    raise BenchmarkError(
                        f"{name}, {one.site}: the model after {one.round} rounds has loss {one.loss:.6f},"
                        f" that of {reference} {expected:.6f}"
                    )


def _require(
    name: str, what: str, expected: Mapping[tuple[str, int], object], found: Mapping[tuple[str, int], object]
) -> None:
    for site, round in sorted(expected.keys() | found.keys()):
        if expected.get((site, round)) != found.get((site, round)):
            raise BenchmarkError(
                f"{name}, {site}, round {round}: did {found.get((site, round))} of {what},"
                f" where {expected.get((site, round))} are to be done"
            )


def _require_once(name: str, run: Run) -> None:
    done = Counter((type(one).__name__, one.site, one.round) for one in run.notes)
    for (what, site, round), times in done.items():
        if times > 1:
            raise BenchmarkError(f"{name}, {site}, round {round}: {what} {times} times")
