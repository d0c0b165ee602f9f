"""Who takes part in the overhead benchmark, how each is started, and how alike their work must be."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import PROJECT, BenchmarkError
from benchmarks.overhead_input import Input
from benchmarks.overhead_notes import NOTES, Note, Scored, Trained, read_notes
from benchmarks.overhead_tree import Cost, cost

OURS, PLAIN, NVFLARE = "ours", "plain", "nvflare"
FLOWER, FLOWER_DEFAULT = "flower", "flower-default"
CONTENDERS = (OURS, PLAIN, FLOWER, FLOWER_DEFAULT, NVFLARE)
PEERS = (FLOWER, FLOWER_DEFAULT, NVFLARE)

_AT_FIRST = 1e-3  # of a loss, relative where it is above 1: the base model's is the same for all
_SAME_BATCHES = 1e-2  # after rounds over the same batches
_OTHER_BATCHES = 5e-2  # after rounds over the same records in other batches


@dataclass(frozen=True)
class Run:
    """One run of a contender: what it cost, and what its processes noted."""

    cost: Cost
    notes: list[Note]

    @property
    def trained(self) -> list[Trained]:
        return [one for one in self.notes if isinstance(one, Trained)]

    @property
    def scored(self) -> list[Scored]:
        return [one for one in self.notes if isinstance(one, Scored)]

    @property
    def seconds_before(self) -> float:
        """From the start to the first training step of any site."""
        return min(one.begun for one in self.trained) - self.cost.begun

    @property
    def seconds_after(self) -> float:
        """From the last training step to the end, when the final model is on the disk."""
        return self.cost.ended - max(one.ended for one in self.trained)


class Contenders:
    """Starts contenders over one input; `work` holds what they write, `flower_python` has Flower."""

    def __init__(self, given: Input, work: Path, environment: Mapping[str, str], flower_python: str) -> None:
        self._given, self._work, self._flower_python = given, work, flower_python
        self._environment = {
            **environment,
            "FEDSFT_HOME": str(given.home),
            "FLWR_HOME": str(work / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's name for: nothing but this machine. Its servers then listen on loopback alone.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "PYTHONPATH": str(PROJECT),
        }

    def run(self, name: str) -> Run:
        """One run; raises BenchmarkError if it fails."""
        notes = self._work / f"{name}.notes"
        notes.unlink(missing_ok=True)
        into = self._work / f"{name}.pt"
        into.unlink(missing_ok=True)
        python, *arguments = self._command(name)
        threads = {"OMP_NUM_THREADS": "1"} if name == NVFLARE else {}
        took = cost(
            [
                python,
                "-m",
                *arguments[:1],
                str(self._given.folder),
                *([] if name == OURS else [str(into)]),
                *arguments[1:],
            ],
            {**self._environment, **threads, NOTES: str(notes)},
            self._work / f"{name}.log",
        )
        return Run(took, read_notes(notes))

    def warm_up(self, names: Iterable[str]) -> None:
        """Nobody is to be the first to compile a module, or to read a library from disk."""
        self._python(sys.executable, "-m", "compileall", "-q", "fedsft_assets", "benchmarks")
        for name in names:
            python, module, *_ = self._command(name)
            missing = (
                "; Flower needs an environment of its own: see --flower-python"
                if name in (FLOWER, FLOWER_DEFAULT)
                else ""
            )
            self._python(python, "-c", f"import {module}, {_LATER[name]}", hint=missing)

    def _command(self, name: str) -> list[str]:
        """Python, module and options after the input's folder."""
        return {
            OURS: [sys.executable, "benchmarks.overhead_ours"],
            PLAIN: [sys.executable, "benchmarks.overhead_plain"],
            NVFLARE: [sys.executable, "benchmarks.overhead_nvflare"],
            FLOWER: [self._flower_python, "benchmarks.overhead_flower", "--cpus", "1"],
            FLOWER_DEFAULT: [self._flower_python, "benchmarks.overhead_flower"],
        }[name]

    def _python(self, *command: str, hint: str = "") -> None:
        done = subprocess.run(command, cwd=PROJECT, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}{hint}")


# What a contender's other processes import.
_LATER = {
    OURS: "fedsft_assets.federation.supervisor, fedsft_assets.federation.server, fedsft_assets.federation.site_trainer",
    NVFLARE: "benchmarks.overhead_nvflare_model, benchmarks.overhead_torch",
    PLAIN: "transformers.models.gpt2.modeling_gpt2",
    FLOWER: "transformers.models.gpt2.modeling_gpt2",
    FLOWER_DEFAULT: "transformers.models.gpt2.modeling_gpt2",
}


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
        same = not part.shuffled or OURS not in (name, reference) or name == reference
        for run in tries:
            _require(name, "training", steps, {(one.site, one.round): (one.steps, one.tokens) for one in run.trained})
            _require(name, "validation", scores, {(one.site, one.round): one.tokens for one in run.scored})
            _require_once(name, run)
            for one in run.scored:
                tolerance = _AT_FIRST if one.round == 0 else _SAME_BATCHES if same else _OTHER_BATCHES
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
