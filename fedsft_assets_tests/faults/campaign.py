"""Executions of jobs into which faults are injected, until each has come to its end, and what came of them."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.runtimes.processes import marked_processes, stop_marked
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.store import Store
from fedsft_assets.versions import current
from fedsft_assets_tests.faults import comparison
from fedsft_assets_tests.faults.attempts import Attempts, TooLongError, WrongError, workspace_of
from fedsft_assets_tests.faults.comparison import Result
from fedsft_assets_tests.faults.faults import PLACES, SITE_TIMEOUT, Fault, Plan, plan
from fedsft_assets_tests.faults.outcome import Outcome, Verdict
from fedsft_assets_tests.faults.systems import SYSTEMS, System
from fedsft_assets_tests.prepared import build_job

# Jobs that take turns, by what is special about them: the shipped job, and what is changed of it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "three sites": ("fedavg", {"rounds": 4}),
    "two of three suffice": ("fedavg", {"rounds": 4, "min_sites": 2}),
    "bf16 differences": ("fedavg", {"rounds": 4, "wire": "bf16-diff"}),
    "momentum at the server": (
        "fedavg",
        {"rounds": 4, "algorithm": {"name": "fedopt", "optimizer": "momentum", "learning_rate": 1.0, "beta1": 0.6}},
    ),
    "scaffold": ("fedavg", {"rounds": 4, "algorithm": "scaffold"}),
    "one site": ("alpaca", {"rounds": 6}),
}
_SHORT = {
    **{"max_local_steps": 2, "max_evaluation_records": 8, "optimizer_state": "reset"},
    "site_timeout": SITE_TIMEOUT,
}
_MOST_SECONDS = 150.0  # of an execution without faults
_MOST_WITHOUT_A_HIT = 6  # executions one after the other


class Campaign:
    """Faults in the executions of one runtime, one execution after the other.

    `target`, `kind` and `variant` leave all others out; without a variant, all take turns. What is done in an execution
    depends on the seed, on these, and on the execution's number.
    """

    def __init__(
        self,
        store: Store,
        runtime: str,
        seed: int,
        say: Callable[[str], object] = print,
        target: str | None = None,
        kind: str | None = None,
        variant: str | None = None,
    ) -> None:
        self.outcome = Outcome()
        self._stopped = False
        self._store, self._say, self._seed = store, say, seed
        self._place = PLACES[runtime].only(target, kind)
        self._variants = [variant] if variant else list(VARIANTS)
        narrowed = {"target": target, "kind": kind, "variant": variant}
        self._narrowed = "".join(f" --{name} '{value}'" for name, value in narrowed.items() if value)
        self._system: System = SYSTEMS[runtime](store)
        self._seconds: dict[str, float] = {}  # of executions without faults, by variant

    def run(self, faults: int, execution: int | None = None) -> Outcome:
        """Inject so many faults into one execution after the other; or do the one of that number.

        Whatever happens, nothing is left running.
        """
        try:
            self._system.start()
            self._execute_until(faults, execution)
        except Exception as error:  # other runtimes go on
            self._wrong(f"{self._system.name}: the campaign ends early: {error}")
        finally:
            self._stop_jobs()
            self._system.stop()
        marks = [*self._marks, *self._system.marks]
        if left := [process.pid for mark in marks for process in marked_processes(mark)]:
            self._wrong(f"{self._system.name}: processes {left} are left")
        return self.outcome

    def stop(self) -> None:
        """Have `run` end soon, from another thread."""
        self._stopped = True

    def _execute_until(self, faults: int, execution: int | None) -> None:
        number, without_a_hit = execution or 1, 0
        while (before := self.outcome.injected.total()) < faults:
            self._execute(number, self._variants[(number - 1) % len(self._variants)], faults - before)
            if execution:
                return
            number += 1
            without_a_hit = 0 if self.outcome.injected.total() > before else without_a_hit + 1
            if without_a_hit == _MOST_WITHOUT_A_HIT:
                raise RuntimeError(f"{without_a_hit} executions went by without a fault that hit")

    def _execute(self, number: int, variant: str, most: int) -> None:
        """One execution of the variant with faults, beside one without, which is made when it is not there yet."""
        job = build_variant(self._store, variant)
        hits: list[Fault] = []

        def hit(fault: Fault, how: str) -> None:
            hits.append(fault)
            self.outcome.injected[self._system.name, fault.target, fault.kind] += 1
            self._say(f"  {self._system.name} {number} ({variant}), {how}")

        begun = time.monotonic()
        what: list[str] = []
        verdict = Verdict.WRONG
        try:
            reference = self._reference(variant)
            planned = plan(self._place, f"{self._seed} {self._system.name} {number}")
            attempts = self._attempts(job, self._seconds[variant], hit)
            refused = attempts.run(Plan(min(planned.count, most), planned.attempts))
            attempts.settle()
            what = self._differences(variant, reference)
            if not what:
                verdict = Verdict.REFUSED if refused else Verdict.RECOVERED
        except TooLongError as error:
            verdict, what = Verdict.TOO_LONG, [str(error)]
        except (WrongError, RuntimeError) as error:
            what = [str(error)]
        for fault in hits:
            self.outcome.judged[(self._system.name, fault.target, fault.kind), verdict] += 1
        seconds = time.monotonic() - begun
        self._say(f"{self._system.name} {number} ({variant}): {len(hits)} faults {verdict}, {seconds:.0f} s")
        if what:
            self._failed(number, most, f"{variant}, {verdict}: {'; '.join(what)}")

    def _failed(self, number: int, most: int, what: str) -> None:
        """Say how to do it again, and go on without anything of what failed."""
        again = (
            f"--runtime {self._system.name} --seed {self._seed} --execution {number} --faults {most}{self._narrowed}"
        )
        self._say(what)
        lines = [line for line in what.splitlines() if line]
        short = " … ".join(dict.fromkeys([lines[0], lines[-1]]))
        self._wrong(f"{self._system.name} {number}: {short}\n  again: python -m fedsft_assets_tests.faults {again}")
        self._stop_jobs()
        for job, _ in VARIANTS.values():
            shutil.rmtree(self._store.flare(job), ignore_errors=True)
        self._system.renew()

    def _wrong(self, what: str) -> None:
        self.outcome.wrong.append(what)
        self._say(f"WRONG: {what}")

    def _attempts(self, job: str, seconds: float, hit: Callable[[Fault, str], object]) -> Attempts:
        return Attempts(self._system, self._store, job, seconds, hit, lambda: self._stopped)

    def _reference(self, variant: str) -> Result:
        """What the variant gives in this runtime without faults: elsewhere, trainers may have more threads."""
        job, _ = VARIANTS[variant]
        folder = self._store.home / "reference" / variant
        if variant not in self._seconds:
            begun = time.monotonic()
            self._attempts(job, _MOST_SECONDS, lambda _fault, _how: None).undisturbed()
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self._workspace(job).folder, folder / "workspace", symlinks=True)
            shutil.copytree(current(self._store.checkpoint(job)), folder / "checkpoint")
            self._seconds[variant] = time.monotonic() - begun
            self._say(f"{self._system.name} ({variant}) takes {self._seconds[variant]:.0f} s without faults")
        reference = Result.of_execution(folder / "workspace", folder / "checkpoint")
        if missed := reference.report["missed"]:
            raise WrongError(f"without any fault, rounds went on without sites: {missed}")
        return reference

    def _differences(self, variant: str, reference: Result) -> list[str]:
        job, _ = VARIANTS[variant]
        spec = JobFolder.read(current(self._store.job_folder(job))).spec
        workspace = self._workspace(job)
        found = Result.of_execution(workspace.folder, current(self._store.checkpoint(job)))
        missed = found.missed(spec)
        if missed and not spec.min_sites:
            return [f"rounds went on without sites: {missed}"]
        expected = reference
        if missed:
            folder = self._store.home / "same_participation" / variant / json.dumps(missed, sort_keys=True)
            expected = comparison.with_same_participation(
                self._store, job, missed, self._system.trainer_threads, folder
            )
        differs = comparison.differences(expected, found)
        differs += comparison.rounds_done_again(workspace.journal)
        return differs + comparison.differences_in_mlflow(self._store, workspace, spec.sites)

    def _stop_jobs(self) -> None:
        for mark in self._marks:
            stop_marked(mark)

    @property
    def _marks(self) -> set[str]:
        return {str(folder) for job, _ in VARIANTS.values() for folder in self._store.flare(job).glob("*/")}

    def _workspace(self, job: str) -> Workspace:
        return workspace_of(current(self._store.job_folder(job)), self._store, self._system.name)


def build_variant(store: Store, variant: str) -> str:
    """Build the variant's job folder; gives the job's name."""
    job, changes = VARIANTS[variant]
    return build_job(store, job, **{**_SHORT, **changes})


def prepared_copy(prepared: Path, into: Path) -> Store:
    """A home of a campaign's own, of one that `prepare_home` made."""
    return Store(shutil.copytree(prepared, into, symlinks=True))
