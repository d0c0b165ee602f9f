"""What a job gives when sites miss rounds, computed in one process.

`python -m … <job folder> <testing file> <missed> <threads> <into>` has the server's own rounds over the sites' own
trainers, without NVFlare between them; each trainer has so many threads. `missed` says in JSON who misses which round
(1-based); the last score is round number `rounds` + 1. A site that misses a round still does its task, and its points
are written down apart: in a federation, it may have told them before it was gone.
"""

import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from fedsft_assets.federation.job_folder import JobFolder, round_limits
from fedsft_assets.federation.protocol.costs import is_cost
from fedsft_assets.federation.protocol.messages import BEST_MODEL, KIND_KEY, TRAIN_TASK, VERSION, VERSION_KEY, Kind
from fedsft_assets.federation.protocol.phases import PhaseClock
from fedsft_assets.federation.protocol.points import Point, points_to_data
from fedsft_assets.federation.server.controller import FederatedSFT
from fedsft_assets.federation.site.trainer import SiteTrainer
from fedsft_assets.federation.supervisor.checkpoint import make_checkpoint
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets_tests.federation.lazy import materialize

T = TypeVar("T")

POINTS_OF_THE_MISSING = "missing.json"
SCORES = "scores.json"


class _Rounds(FederatedSFT):
    """The server's part of a job, which asks trainers in this process."""

    def __init__(
        self, spec: JobSpec, plans: list[SitePlan], missed: dict[str, list[int]], home: Path, folder: Path
    ) -> None:
        super().__init__(
            sites=list(spec.sites),
            num_rounds=spec.rounds,
            limits=round_limits(plans, spec.private_sites, home).model_dump(),
            base_model=str(plans[0].base_model),
            min_sites=spec.min_sites,
            wire=spec.wire,
            algorithm=spec.algorithm.model_dump(),
        )
        self._missed, self._run_dir = missed, folder
        self.of_the_missing: list[Point] = []
        self._absent: set[str] = set()  # in the round that is under way
        self._trainers = {plan.site: SiteTrainer(plan, PhaseClock(), partial(self._tell, plan.site)) for plan in plans}
        self.open(folder / "state")

    def _tell(self, site: str, text: str, points: list[Point]) -> None:
        if site in self._absent:
            self.of_the_missing += points
        elif points:
            self.note_report(site, json.dumps({"id": uuid.uuid4().hex, "text": text, "points": points_to_data(points)}))

    def _broadcast_task(
        self,
        task: str,
        number: int,
        take: Callable[[str, FLModel], T],
        compare: Callable[[Mapping[str, T]], dict[str, str]],
    ) -> dict[str, T]:
        results = {}
        self.review.begin(number)
        self._absent = {site for site in self.sites if number + 1 in self._missed.get(site, [])}
        for site in self.sites:
            trainer = self._trainers[site]
            sent = FLModel(
                params={name: tensor.clone() for name, tensor in self.global_model.tensors(Kind.FULL).items()},
                params_type=ParamsType.FULL,
                current_round=number,
                total_rounds=self.num_rounds,
                meta={KIND_KEY: str(Kind.FULL), VERSION_KEY: VERSION},
            )
            result = trainer.train(sent) if task == TRAIN_TASK else trainer.evaluate(sent)
            if site in self._absent:
                continue
            if task == TRAIN_TASK:
                result.params = {name: materialize(tensor) for name, tensor in result.params.items()}
            results[site] = take(site, result)
        assert compare(results) == {}
        return results

    def get_run_dir(self) -> str:
        return str(self._run_dir)

    def info(self, msg: str) -> None:
        """Nobody reads it."""

    def panic(self, reason: str) -> None:
        raise RuntimeError(reason)


def main() -> None:
    job_folder, testing_file, into = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[5])
    missed = json.loads(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    job = JobFolder.read(job_folder)
    rounds = _Rounds(job.spec, job.located_plans, missed, job.home, into)
    rounds.run()
    points = [point for point in rounds.of_the_missing if not is_cost(point.name)]
    (into / POINTS_OF_THE_MISSING).write_text(json.dumps([asdict(point) for point in points]))
    command = [sys.executable, "-m", "fedsft_assets.federation.supervisor.checkpoint"]
    made_of_it = make_checkpoint(command, dict(os.environ), job_folder, into / BEST_MODEL, testing_file, into)
    (into / SCORES).write_text(json.dumps(asdict(made_of_it)))


if __name__ == "__main__":
    main()
