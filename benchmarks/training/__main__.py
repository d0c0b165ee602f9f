"""Compares this project's training with a plain loop, the Hugging Face Trainer and TRL's SFTTrainer, on CPU.

Run `python -m benchmarks.training` from the project's root, on Linux. All train the same model on the same
real records, and their losses must be equal. The last lines are the targets, each as
`NAME VALUE TARGET ok|short`; a target that is short is no error, unequal losses are.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from benchmarks.data import PROJECT, SAMPLES, BenchmarkError, Target, print_targets, require_samples, say
from benchmarks.training.flops import Share
from benchmarks.training.parts import CONTENDERS, PARTS, RIVALS, SAME_BATCHES, Part
from benchmarks.training.watch import Trained

STARTUP, PHASES = "startup", "phases"
_STARTS = 5
_TOLERANCE = 1e-3  # of a loss, relative where it is above 1

Runs = dict[str, list[Trained]]


def main() -> None:
    """Measure the parts, print a table for each and then the targets."""
    args = _arguments()
    require_samples()
    print_targets("training", args.keep, lambda work: _Benchmark(args, work).run())


class _Benchmark:
    """The parts of one run, with the inputs that they share."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.inputs: dict[str, Path] = {}

    def run(self) -> list[Target]:
        say(f"{_cores()} CPUs, as many threads for each contender, load average {os.getloadavg()[0]:.1f}")
        self._process("-c", "import benchmarks.rivals, benchmarks.training.ours, datasets, trl")  # compiled and cached
        targets = []
        for name in self.args.part:
            targets += {
                "tiny": self._tiny,
                "smollm2": self._smollm2,
                "gpt2-small": self._gpt2_small,
                STARTUP: self._startup,
                PHASES: self._phases,
            }[name]()
        say(f"load average at the end {os.getloadavg()[0]:.1f}\n")
        return targets

    def _tiny(self) -> list[Target]:
        runs = self._train(self._part("tiny"))
        best = max(RIVALS, key=lambda name: median(run.tokens_per_second for run in runs[name]))
        return [
            Target("tiny_vs_trainer", _times(runs, "trainer"), 1.5, at_least=True),
            Target("tiny_vs_best_other", _times(runs, best), 1.1, at_least=True),
        ]

    def _smollm2(self) -> list[Target]:
        runs = self._train(self._part("smollm2"))
        ours, plain = (median(run.peak_mb for run in runs[name]) for name in ("ours", "plain"))
        return [
            Target("smollm2_vs_trainer", _times(runs, "trainer"), 2.4, at_least=True),
            Target("smollm2_memory_vs_plain", ours / plain, 0.5),
        ]

    def _gpt2_small(self) -> list[Target]:
        part = self._part("gpt2-small")
        folder = self._input(part)
        say(f"\n{part.name:18}{'tokens/s':>10}{'GFLOP/s':>10}{'product':>10}{'and after':>10}{'share':>8}")
        shares = {}
        for contender in part.contenders:
            found = shares[contender] = Share(**self._json("benchmarks.training.flops", contender, str(folder)))
            say(
                f"{contender:18}{found.tokens_per_second:10.1f}{found.training:10.1f}"
                f"{found.before:10.1f}{found.after:10.1f}{found.of_product:8.2f}"
            )
        return [Target("gpt2_small_of_matmul", shares["ours"].of_product, 0.75, at_least=True)]

    def _startup(self) -> list[Target]:
        start = ("-m", "benchmarks.training.startup", str(self._input(self._part("tiny")) / "plan.json"))
        self._process(*start)  # leaves the tokens behind, as the data assets do
        starts = 1 if self.args.quick else _STARTS
        seconds = [float(self._process(*start).splitlines()[-1]) for _ in range(starts)]
        say(f"\n{STARTUP:18}CPU s to the first batch: {', '.join(f'{value:.1f}' for value in sorted(seconds))}")
        return [Target("startup_cpu_seconds", median(seconds), 6)]

    def _phases(self) -> list[Target]:
        """Where the seconds of a short federated job go; there is no target for them here."""
        seconds = self._json("benchmarks.training.phases", str(self._input(self._part("tiny"))))
        said = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
        say(f"\n{PHASES:18}seconds, at the slowest of three sites: {said}")
        return []

    def _part(self, name: str) -> Part:
        part = PARTS[name]
        if self.args.all:
            part = replace(part, contenders=("ours", "plain") if name == "gpt2-small" else CONTENDERS)
        if self.args.quick:
            part = part.quick()
        return replace(part, steps=self.args.steps or part.steps, repeats=self.args.repeats or part.repeats)

    def _input(self, part: Part) -> Path:
        if part.name not in self.inputs:
            folder = self.work / part.name
            self._process("-m", "benchmarks.training.data", str(SAMPLES), str(folder), json.dumps(asdict(part)))
            self.inputs[part.name] = folder
        return self.inputs[part.name]

    def _train(self, part: Part) -> Runs:
        """All contenders in turn, as often as the part says, so that a slow minute meets them all."""
        folder = self._input(part)
        runs: Runs = {name: [] for name in part.contenders}
        for _ in range(part.repeats):
            for name in part.contenders:
                runs[name].append(Trained(**self._json("benchmarks.training.run", name, str(folder))))
        _table(part, runs)
        require_equal_losses(part, runs)
        return runs

    def _json(self, module: str, *arguments: str) -> dict:
        return json.loads(self._process("-m", module, *arguments).splitlines()[-1])

    def _process(self, *arguments: str) -> str:
        """What Python prints; a process of its own has memory and threads of its own.

        A child's peak starts from the memory of the process that starts it, see getrusage(2) on
        ru_maxrss: so this module imports nothing heavy.
        """
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=PROJECT,
            env=_environment(self.work),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchmarkError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout


def _environment(work: Path) -> dict[str, str]:
    """No network, nothing written to HOME, and all cores for whoever trains."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {
        **kept,
        "OMP_NUM_THREADS": str(_cores()),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hub"),
        "MPLCONFIGDIR": str(work / "matplotlib"),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _times(runs: Runs, other: str) -> float:
    """Our tokens per second as a multiple of another's in the same repetition; the median of all."""
    pairs = zip(runs["ours"], runs[other], strict=True)
    return median(ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs)


def _table(part: Part, runs: Mapping[str, Sequence[Trained]]) -> None:
    say(f"\n{part.name:18}{'tokens/s':>10}{'of ours':>9}{'peak MB':>9}{'start CPU s':>13}{'first loss':>12}{'last':>8}")
    ours = median(run.tokens_per_second for run in runs["ours"])
    for name, tries in runs.items():
        speed = median(run.tokens_per_second for run in tries)
        start = median(run.start_cpu_seconds for run in tries)
        say(
            f"{name:18}{speed:10.1f}{speed / ours:9.2f}{median(run.peak_mb for run in tries):9.0f}"
            f"{start:13.1f}{tries[0].first_loss:12.4f}{tries[0].losses[-1]:8.4f}"
        )


def require_equal_losses(part: Part, runs: Mapping[str, Sequence[Trained]]) -> None:
    """The first batch has one loss for all, and each step has one for those that take the same batches."""
    expected = runs["plain"][0]
    for name, tries in runs.items():
        for run in tries:
            found = [run.first_loss, *run.losses] if name in SAME_BATCHES else [run.first_loss]
            wanted = [expected.first_loss, *expected.losses]
            if name in SAME_BATCHES and len(run.losses) != len(expected.losses):
                raise BenchmarkError(
                    f"{part.name}: {name} did {len(run.losses)} steps, plain did {len(expected.losses)}"
                )
            for place, (ours, theirs) in enumerate(zip(found, wanted, strict=False)):
                # Written so that a loss that is not a number is unequal too.
                if not abs(ours - theirs) <= _TOLERANCE * max(1.0, abs(theirs)):
                    what = f"step {place}" if place else "the first batch"
                    raise BenchmarkError(f"{part.name}: {name} has loss {ours:.6f} at {what}, plain has {theirs:.6f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parts = (*PARTS, STARTUP, PHASES)
    parser.add_argument("--part", action="append", choices=parts, help="leave out the others; may be repeated")
    parser.add_argument("--all", action="store_true", help="all contenders in all parts; takes an hour")
    parser.add_argument("--quick", action="store_true", help="a few small steps: shows that it runs, not how fast")
    parser.add_argument("--steps", type=int, help="optimizer steps in place of a part's own")
    parser.add_argument("--repeats", type=int, help="runs of each contender in place of a part's own")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder and leave all files there")
    args = parser.parse_args()
    args.part = args.part or list(parts)
    if (args.steps is not None and args.steps < 2) or (args.repeats is not None and args.repeats < 1):
        parser.error("--steps must be at least 2, of which one warms up, and --repeats at least 1")
    return args


if __name__ == "__main__":
    main()
