"""Measures the exchange of models without training, beside NVFlare's FedAvgRecipe in the same run.

Run `python -m benchmarks.transfer` from the project's root, on Linux. Both ways go through NVFlare's own simulator,
with a process of its own for each trainer. Ours is the job that this project builds and the wire of its sites; the
stock way is the recipe at its own settings, but with tensors of PyTorch on the wire, as here. The trainers hold no
model beside what travels. The last lines are the targets, each as `NAME VALUE TARGET ok|short`; a target that is short
is no error.

What counts as the model, in bytes: for the sizes 0.25, 0.5 and 1.3 GB its weights in float32, which is what travels and
what the server holds. 2.6 GB are 1.3 billion parameters in bf16, which is what travels with the wire `bf16-diff` and
with the stock way, whose whole model is bf16 then; of ours, server and sites hold it in float32, 5.3 GB, and memory is
compared with that. The first round of `bf16-diff` sends sites the whole model in float32; it is not in the figures.

MB/s are bytes of the model to or from all sites over the time in which they travelled, from the first byte asked for to
the last one there. A round is from one arrival of the model at the last site to the next: with the average and the
state on the disk. Memory is anonymous memory (see `watch`), the largest of each process while the job ran. A
site's is that of its trainer above what it was before it had a model; the server's is all of it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.data import BenchmarkError, Target, print_targets, say
from benchmarks.transfer.job import Exchange, environment, our_job, stock_job
from benchmarks.transfer.model import Shape, write_archive
from benchmarks.transfer.watch import MemoryWatch, Peaks
from fedsft_assets.federation.runtimes.processes import MARK, stop_marked

OURS, STOCK = "ours", "stock"
TINY = "tiny"
SIZES = {
    TINY: Shape(layers=4, width=256, vocabulary=8192),
    "0.25": Shape(layers=12, width=512),
    "0.5": Shape(layers=12, width=768),
    "1.3": Shape(layers=22, width=1024),
    "2.6": Shape(layers=24, width=2048),
}
BF16 = "2.6"
_MANY, _FEW, _OF_MANY = 8, 3, "0.25"  # sites, and the size of the model that the server exchanges with so many
_LARGE = ("0.5", "1.3", "2.6")
_GIGABYTE = 1e9
_LEAST_FREE = 0.5 * _GIGABYTE  # below it, a run is ended before the system ends something


@dataclass(frozen=True)
class Run:
    """One job: what it exchanged, and its steady rounds; rates in bytes a second, all sites together."""

    way: str
    size: str
    exchange: Exchange
    peaks: Peaks
    idle: int
    seconds: float
    down: float
    up: float

    @property
    def both(self) -> float:
        """Bytes a second of a round's traffic, there and back."""
        return 2 / (1 / self.down + 1 / self.up)

    @property
    def held(self) -> int:
        """Bytes of the model as ours holds it."""
        return self.exchange.shape.parameters * 4

    @property
    def trainer(self) -> int:
        return self.peaks.of("trainer") - self.idle


class DoesNotFitError(BenchmarkError):
    """The machine has not the memory for it."""


def main() -> None:
    """Measure, print a table and then the targets."""
    args = _arguments()
    print_targets("transfer", args.keep, lambda work: _Benchmark(args, work).run())


class _Benchmark:
    """The runs of one call, and the archives that they share."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work

    def run(self) -> list[Target]:
        sizes = [TINY] if self.args.quick else self.args.size
        say(f"{os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
        say(
            f"\n{'GB':5}{'way':>6}{'sites':>7}{'s/round':>9}{'down':>7}{'up':>7}{'MB/s':>7}"
            f"{'server':>9}{'NVFlare':>9}{'trainer':>9}{'together':>10}"
        )
        targets = []
        for size in sizes:
            runs = self._size(size)
            targets += size_targets(size, runs[OURS], runs[STOCK])
        if not self.args.quick and _OF_MANY in sizes:
            targets.append(self._many())
        say(f"load average at the end {os.getloadavg()[0]:.1f}\n")
        return targets

    def _size(self, size: str) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {OURS: [], STOCK: []}
        for _ in range(self.args.repeats):
            for way in (OURS, STOCK):
                try:
                    runs[way].append(self._one(way, size, _FEW))
                except DoesNotFitError as error:
                    say(f"{size:5}{way:>6}{_FEW:7d}  does not fit: {error}")
        return runs

    def _many(self) -> Target:
        run = self._one(OURS, _OF_MANY, _MANY)
        return Target(f"transfer_{_OF_MANY}_server_memory_{_MANY}_sites", run.peaks.of("server") / run.held, 3)

    def _one(self, way: str, size: str, sites: int) -> Run:
        archive = self.work / f"{size}.nemo"
        if not archive.exists():
            for other in self.work.glob("*.nemo"):
                other.unlink()
            write_archive(SIZES[size], archive)
        exchange = Exchange(SIZES[size], sites, self.args.rounds, size == BF16)
        run = _run(way, size, exchange, archive, self.work / way)
        _show(run)
        return run


def _run(way: str, size: str, exchange: Exchange, archive: Path, folder: Path) -> Run:
    diaries = folder / "diaries"
    diaries.mkdir(parents=True)
    mark = f"benchmark transfer {uuid.uuid4().hex}"
    job = our_job(exchange, archive, diaries, folder) if way == OURS else stock_job(exchange, diaries, folder)
    local = folder / "nvflare" / "local"
    local.mkdir(parents=True)
    (local / "resources.json").write_text('{"class_allow_list": ["*"]}')  # the trainers of both are not installed ones
    command = [
        *(sys.executable, "-m", "nvflare.cli", "simulator", str(job), "-w", str(folder / "nvflare")),
        *("-c", ",".join(exchange.site_names), "-t", str(exchange.sites)),
    ]
    try:
        with (folder / "log").open("wb") as log, MemoryWatch(mark) as watch:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment(folder, ours=way == OURS), MARK: mark},
                cwd=folder,
            )
            try:
                while process.poll() is None and watch.peaks.least_free > _LEAST_FREE:
                    time.sleep(0.2)
            finally:
                stop_marked(mark)
                code = process.wait()
        if watch.peaks.least_free <= _LEAST_FREE:
            raise DoesNotFitError(
                f"its processes held {watch.peaks.together / _GIGABYTE:.1f} GB together, and the machine had"
                f" {watch.peaks.least_free / _GIGABYTE:.1f} GB left"
            )
        notes = _notes(diaries)
        if code or len(notes) < exchange.sites:
            end = (folder / "log").read_text(encoding="utf-8", errors="replace")[-4000:]
            raise BenchmarkError(f"the {way} job of {size} GB ended with exit code {code}:\n{end}")
        return run_figures(way, size, exchange, watch.peaks, notes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Note:
    """What a site wrote into its diary."""

    what: str
    round: int
    begun: float
    ended: float
    memory: int


def _notes(diaries: Path) -> dict[str, list[Note]]:
    return {
        path.stem: [Note(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in diaries.glob("*.jsonl")
    }


def run_figures(way: str, size: str, exchange: Exchange, peaks: Peaks, notes: dict[str, list[Note]]) -> Run:
    """Of the rounds after the first, in which sites are still starting."""
    everything = [note for site in notes.values() for note in site]
    size_of_all = exchange.bytes * exchange.sites

    def of(what: str, number: int) -> list[Note]:
        return [note for note in everything if (note.what, note.round) == (what, number)]

    def rate(what: str) -> float:
        return size_of_all / median(_span(of(what, number)) for number in range(1, exchange.rounds))

    arrivals = [max(note.ended for note in of("down", number)) for number in range(exchange.rounds)]
    return Run(
        way=way,
        size=size,
        exchange=exchange,
        peaks=peaks,
        idle=max(note.memory for note in everything if note.what == "idle"),
        seconds=median(later - earlier for earlier, later in pairwise(arrivals)),
        down=rate("down"),
        up=rate("up"),
    )


def _span(notes: Iterable[Note]) -> float:
    notes = list(notes)
    return max(note.ended for note in notes) - min(note.begun for note in notes)


def size_targets(size: str, ours: Sequence[Run], stock: Sequence[Run]) -> list[Target]:
    """Without a run of ours that fits there is nothing to compare, and memory says so."""
    targets = []
    if ours and stock:
        speedup = median(run.both for run in ours) / median(run.both for run in stock)
        targets.append(Target(f"transfer_{size}_vs_stock", speedup, 1.5, at_least=True))
    if ours and size in (TINY, *_LARGE):
        held = ours[0].held
        targets += [
            Target(f"transfer_{size}_server_memory", max(run.peaks.of("server") for run in ours) / held, 3),
            Target(f"transfer_{size}_site_memory", max(run.trainer for run in ours) / held, 1.5),
        ]
    if size == BF16:
        together = max((run.peaks.together for run in ours), default=0) / _GIGABYTE
        targets.append(Target(f"transfer_{size}_gb_together", together if ours else float("inf"), 24))
    return targets


def _show(run: Run) -> None:
    peaks = run.peaks
    sizes = (peaks.of("server"), peaks.of("site"), peaks.of("trainer"), peaks.together)
    say(
        f"{run.size:5}{run.way:>6}{run.exchange.sites:7d}{run.seconds:9.1f}{run.down / 1e6:7.0f}{run.up / 1e6:7.0f}"
        f"{run.both / 1e6:7.0f}"
        + "".join(f"{size / _GIGABYTE:{width}.2f}" for size, width in zip(sizes, (9, 9, 9, 10), strict=True))
    )
    say("     " + ", ".join(f"{name} {peak / _GIGABYTE:.2f}" for name, peak in sorted(peaks.each.items())))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, only to see that everything runs")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="GB; all but the tiny one unless said")
    parser.add_argument("--rounds", type=int, default=3, help="of each job, of which the first is not in the figures")
    parser.add_argument("--repeats", type=int, default=1, help="jobs of each way and size, in turn (default 1)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder, and leave the archives there")
    args = parser.parse_args()
    if args.rounds < 2 or args.repeats < 1:
        parser.error("--rounds must be at least 2 and --repeats at least 1")
    args.size = args.size or [size for size in SIZES if size != TINY]
    return args


if __name__ == "__main__":
    main()
