"""Who takes part in the overhead benchmark, and how each is started."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.data import PROJECT, BenchmarkError
from benchmarks.overhead.input import Input
from benchmarks.overhead.notes import NOTES, Note, Scored, Trained, read_notes
from benchmarks.overhead.tree import Cost, cost

OURS, PLAIN, NVFLARE = "ours", "plain", "nvflare"
FLOWER, FLOWER_DEFAULT = "flower", "flower-default"
PEERS = (FLOWER, FLOWER_DEFAULT, NVFLARE)


@dataclass(frozen=True)
class _Contender:
    """A module that is given the input's folder, where to write the final model, and options.

    Its processes import `later` too. `flower` has it run by the interpreter that has Flower.
    """

    module: str
    later: str
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    flower: bool = False


_GPT2 = "transformers.models.gpt2.modeling_gpt2"
_CONTENDERS = {
    OURS: _Contender(
        "benchmarks.overhead.ours",
        "fedsft_assets.federation.supervisor.supervisor, fedsft_assets.federation.server.controller,"
        " fedsft_assets.federation.site.trainer",
    ),
    PLAIN: _Contender("benchmarks.overhead.plain", _GPT2),
    FLOWER: _Contender("benchmarks.overhead.flower", _GPT2, options=("--cpus", "1"), flower=True),
    FLOWER_DEFAULT: _Contender("benchmarks.overhead.flower", _GPT2, flower=True),
    # By default each of its trainers takes all cores, and they get in each other's way.
    NVFLARE: _Contender("benchmarks.overhead.nvflare_job", _GPT2, environment={"OMP_NUM_THREADS": "1"}),
}
CONTENDERS = tuple(_CONTENDERS)


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
        contender, model, notes = _CONTENDERS[name], self._work / f"{name}.pt", self._work / f"{name}.notes"
        model.unlink(missing_ok=True)
        notes.write_text("")
        took = cost(
            [self._python(contender), "-m", contender.module, self._given.folder, model, *contender.options],
            {**self._environment, **contender.environment, NOTES: str(notes)},
            self._work / f"{name}.log",
        )
        if not model.is_file() or not (done := Run(took, read_notes(notes))).trained:
            raise BenchmarkError(f"{name}: trained nothing, or left no model; see {self._work / name}.log (--keep)")
        return done

    def warm_up(self, names: Iterable[str]) -> None:
        """Nobody is to be the first to compile a module, or to read a library from disk."""
        self._prepare(sys.executable, "-m", "compileall", "-q", "fedsft_assets", "benchmarks")
        for contender in (_CONTENDERS[name] for name in names):
            hint = "Flower needs an environment of its own; see --flower-python" if contender.flower else ""
            self._prepare(self._python(contender), "-c", f"import {contender.module}, {contender.later}", hint=hint)

    def _python(self, contender: _Contender) -> str:
        return self._flower_python if contender.flower else sys.executable

    def _prepare(self, *command: str, hint: str = "") -> None:
        done = subprocess.run(command, cwd=PROJECT, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}{hint}")
