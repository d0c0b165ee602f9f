"""What a notebook asks of a study's home: the tables behind the comparison, as pandas DataFrames.

from fedsft_assets.evaluation.tables import Tables

tables = Tables(".fedsft")
tables.matrix()
"""

from __future__ import annotations

from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from fedsft_assets.evaluation.budgets import budgets, traffic
from fedsft_assets.evaluation.matrix import loss_matrix
from fedsft_assets.evaluation.record_scores import common_records, read_losses
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.home_file import read_home
from fedsft_assets.specs.job import DEFAULT_SEED
from fedsft_assets.store import seed_of
from fedsft_assets.versions import CURRENT, NoVersionError, current

if TYPE_CHECKING:
    import pandas as pd


class Tables:
    """Of the current checkpoints and evaluations in the home `home`. Losses are in nats per answer token."""

    def __init__(self, home: str | Path) -> None:
        self._home = Path(home).absolute()

    def losses(self) -> pd.DataFrame:
        """A row for each model, seed, record and dataset that has it (see `evaluation.record_scores`).

        Raises NoVersionError if nothing was evaluated yet.
        """
        if evaluations := self._current("evaluations"):
            return read_losses(evaluations)
        raise NoVersionError(f"{self._home}: has no evaluation; materialize evaluation/base_model and others first")

    def matrix(self) -> pd.DataFrame:
        """The loss of each model on all datasets together and on each, on records that all were scored on."""
        return loss_matrix(common_records(self.losses()))

    def curves(self) -> pd.DataFrame:
        """A row for each job, seed and round: `val_loss` of the global model, and what it had taken to know it.

        `records` were trained on by then, `bytes` sent by all sites and to them, `seconds` had passed since the job's
        start; bytes and seconds of jobs of an earlier version of this package are <NA>. `validation_split` is the
        digest of what the model was scored on: only curves over one split compare.
        """
        import pandas as pd

        columns = ["job", "kind", "seed", "validation_split", "round", "records", "bytes", "seconds", "val_loss"]
        rows = [
            (report.job, report.kind, report.seed, report.validation_digest, *values)
            for report in self._reports
            for values in zip(
                range(len(report.val_loss)),
                report.samples,
                report.transferred or repeat(None),
                report.elapsed or repeat(None),
                report.val_loss,
                strict=False,
            )
        ]
        return pd.DataFrame(rows, columns=columns).astype({"seed": "Int64", "bytes": "Int64", "seconds": "Float64"})

    def budgets(self) -> pd.DataFrame:
        """A row for each job and seed with what it cost (see `evaluation.budgets.budgets`)."""
        return budgets(self._reports)

    def traffic(self) -> pd.DataFrame:
        """A row for each job, seed and site: bytes up, from the site to the server, and down."""
        return traffic(self._reports)

    @cached_property
    def _reports(self) -> list[JobReport]:
        return [JobReport.read(version) for version in self._current("checkpoints")]

    def _current(self, group: str) -> list[Path]:
        """The current version of each family of the group that has one, of the seeds that the home is for."""
        home = read_home(self._home, self._home)
        wanted = {int(seed) for seed in home.values["seeds"].split(",")} if home and "seeds" in home.values else None
        families = [
            family
            for family in sorted((self._home / group).glob("*/"))
            if (seed_of(family) or DEFAULT_SEED) in (wanted or {DEFAULT_SEED}) and (family / CURRENT).is_symlink()
        ]
        return list(map(current, families))
