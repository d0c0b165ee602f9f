"""Compares this project's data preparation with the published example's, in time and in memory.

Run `python -m benchmarks.data` from the project's root, on Linux. The last lines are the targets, each
as `NAME VALUE TARGET ok|short`; a target that is short is no error.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.data_files import ALPACA, DOLLY, FOLDERS, OASST1_TRAINING, OASST1_VALIDATION

PROJECT = Path(__file__).resolve().parents[1]
SAMPLES = PROJECT.parent / "shared" / "data" / "real_samples"
SPLITS = ("training", "validation", "testing")
TENFOLD = 10

# Bytecode is compiled once before anything is measured, and everybody may use it.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

Steps = dict[str, "Measured"]


class BenchmarkError(RuntimeError):
    """A step failed, or the two pipelines did not do the same work."""


@dataclass(frozen=True)
class Measured:
    """One or more processes from start to end: wall and CPU seconds, largest resident memory, what was printed."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    printed: str = ""


@dataclass(frozen=True)
class Target:
    """A figure and what it should be: at least, or at most."""

    name: str
    value: float
    target: float
    at_least: bool = False

    def __str__(self) -> str:
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return f"{self.name} {self.value:.2f} {self.target:g} {'ok' if met else 'short'}"


def main() -> None:
    """Measure, print a table and then the targets."""
    args = _arguments()
    if not SAMPLES.is_dir():
        sys.exit(f"{SAMPLES}: is missing; the benchmark's input is made from the real samples there")
    try:
        with work_folder(args.keep) as work:
            _benchmark(args, work)
    except BenchmarkError as error:
        sys.exit(f"benchmarks.data: {error}")


def _benchmark(args: argparse.Namespace, work: Path) -> None:
    say(f"{args.repeats} repeats at {args.scale:g} of the published sizes, {_circumstances(args.reference_python)}")
    _compile_and_warm_up(args.reference_python)
    _generate(work / "input", args.scale)
    references, own = [], []
    for _ in range(args.repeats):
        references.append(_run_reference(args.reference_python, work / "input", work / "reference"))
        own.append(_run_own(work / "input", work / "own"))
        _require_same_records(work, json.loads(own[-1].printed))
    tenfold = None if args.no_tenfold else _run_tenfold(args.scale, work)
    _report(references, own, tenfold)


def measure(command: Sequence[str | Path], log: Path) -> Measured:
    """Run a command from the project's root to its end; BenchmarkError if it fails.

    A child's peak starts from the memory of the process that starts it, see getrusage(2) on ru_maxrss:
    so this module imports nothing heavy, and input is generated in a process of its own.
    """
    os.sync()  # nobody pays for what others have left to write
    with log.with_suffix(".out").open("w+") as printed, log.with_suffix(".err").open("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=PROJECT, env=_ENVIRONMENT, stdout=printed, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        errors.seek(0)
        if process.returncode:
            raise BenchmarkError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{errors.read()}")
        return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6, printed.read())


def _run_reference(python: str, raw: Path, out: Path) -> Steps:
    """The six processes of the published instructions, one after the other."""
    _empty(out)
    for name in (*FOLDERS, "combined"):
        (out / name).mkdir()
    steps: dict[str, list[str | Path]] = {
        "alpaca": ["--training_file", raw / ALPACA, "--output_dir", out / "alpaca"],
        "dolly": ["--training_file", raw / DOLLY, "--output_dir", out / "dolly"],
        "oasst1": [
            *("--training_file", raw / OASST1_TRAINING, "--validation_file", raw / OASST1_VALIDATION),
            *("--output_dir", out / "oasst1"),
        ],
    }
    for split in SPLITS:
        files = [out / name / f"{split}.jsonl" for name in FOLDERS]
        steps[f"combine {split}"] = ["--file_list", *files, "--output_path", out / "combined" / f"{split}.jsonl"]
    measured = {}
    for step, options in steps.items():
        command = [python, "-m", "benchmarks.reference_data", step.split()[0], *options]
        measured[step] = measure(command, out / step.replace(" ", "-"))
    return measured


def _run_own(raw: Path, out: Path) -> Measured:
    _empty(out)
    return measure([sys.executable, "-m", "benchmarks.own_data", raw, out], out / "own")


def _run_tenfold(scale: float, work: Path) -> Measured:
    raw, out = work / "input-tenfold", work / "own-tenfold"
    _generate(raw, scale * TENFOLD)
    return _run_own(raw, out)


def _generate(folder: Path, scale: float) -> None:
    _empty(folder)
    command = [sys.executable, "-m", "benchmarks.data_input", str(SAMPLES), str(folder), str(scale)]
    made = measure(command, folder / "generate")
    say(f"made {folder.name} in {made.seconds:.1f} s with {made.peak_mb:.0f} MB")


def _compile_and_warm_up(reference_python: str) -> None:
    """Neither side is to be first to compile a module, or to read a library from disk."""
    for command in (
        [sys.executable, "-m", "compileall", "-q", "fedsft_assets", "benchmarks"],
        [sys.executable, "-c", "import benchmarks.own_data"],
        [reference_python, "-c", "import benchmarks.reference_data, pyarrow.parquet"],
    ):
        done = subprocess.run(command, cwd=PROJECT, env=_ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _require_same_records(work: Path, reports: Mapping[str, Mapping[str, int]]) -> None:
    """The reference's records are ours plus those that we say we left out, and our files hold what we say."""
    left_out = {name: report["duplicates"] + report["rejected"] for name, report in reports.items()}
    for name, report in reports.items():
        folder = work / "own" / ("combined" if name == "combined" else f"processed/{name}")
        ours, theirs = _count_records(folder), _count_records(work / "reference" / name)
        expected = theirs - (sum(left_out.values()) if name == "combined" else left_out[name])
        if not ours == report["records"] == expected or not ours:
            raise BenchmarkError(
                f"{name}: the reference wrote {theirs} records and ours {ours}, where {expected} are expected: "
                f"the reports say {json.dumps(reports)}"
            )


def _count_records(folder: Path) -> int:
    count = 0
    for split in SPLITS:
        with (folder / f"{split}.jsonl").open("rb") as file:
            while chunk := file.read(1 << 20):
                count += chunk.count(b"\n")
    return count


def _report(references: Sequence[Steps], own: Sequence[Measured], tenfold: Measured | None) -> None:
    rows = {f"reference {step}": _median([run[step] for run in references]) for step in references[0]}
    reference = rows["reference, all six"] = _median([_together(run.values()) for run in references])
    ours = rows["ours"] = _median(own)
    targets = [
        Target("data_speedup", reference.seconds / ours.seconds, 10, at_least=True),
        Target("data_peak_mb", ours.peak_mb, 400),
    ]
    if tenfold:
        rows[f"ours at {TENFOLD} times the rows"] = tenfold
        targets.append(Target("data_peak_growth", tenfold.peak_mb / ours.peak_mb, 1.2))
    say(f"load average at the end {os.getloadavg()[0]:.1f}\n")
    say(f"{'step':30}{'seconds':>9}{'CPU s':>9}{'peak MB':>9}")
    for step, row in rows.items():
        say(f"{step:30}{row.seconds:9.2f}{row.cpu_seconds:9.2f}{row.peak_mb:9.0f}")
    say("")
    for target in targets:
        say(str(target))


def _together(steps: Iterable[Measured]) -> Measured:
    """Processes that ran one after the other, as one."""
    steps = list(steps)
    return Measured(
        sum(step.seconds for step in steps),
        sum(step.cpu_seconds for step in steps),
        max(step.peak_mb for step in steps),
    )


def _median(runs: Sequence[Measured]) -> Measured:
    return Measured(
        median(run.seconds for run in runs),
        median(run.cpu_seconds for run in runs),
        median(run.peak_mb for run in runs),
    )


def _circumstances(reference_python: str) -> str:
    """What the figures depend on besides the code."""
    command = [reference_python, "-c", "import pandas; print(pandas.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{reference_python}: has no pandas to run the reference with:\n{done.stderr}")
    return f"reference with pandas {done.stdout.strip()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}"


def require_samples() -> None:
    """Exit if the real samples that a benchmark trains on are not there."""
    if not SAMPLES.is_dir():
        sys.exit(f"{SAMPLES}: is missing; the benchmark trains on the real samples there")


def print_targets(name: str, keep: Path | None, measured: Callable[[Path], Sequence[Target]]) -> None:
    """Measure in a folder to work in, and print the targets last; exit with the message of a BenchmarkError."""
    try:
        with work_folder(keep) as work:
            targets = measured(work)
    except BenchmarkError as error:
        sys.exit(f"benchmarks.{name}: {error}")
    for target in targets:
        say(str(target))


@contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """The folder to work in: `keep`, where everything then stays, or one that vanishes."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        yield Path(name)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def say(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, interleaved (default 3)")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the published sizes (default 1)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder and leave all files there")
    parser.add_argument("--no-tenfold", action="store_true", help="leave out the run at ten times the rows")
    parser.add_argument(
        "--reference-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter for the reference (default: this one); pandas 1 and 2 run it faster than pandas 3 does",
    )
    args = parser.parse_args()
    if args.repeats < 1 or args.scale <= 0:
        parser.error("--repeats must be at least 1 and --scale more than 0")
    return args


if __name__ == "__main__":
    main()
