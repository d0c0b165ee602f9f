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
from fedsft_assets.versions import CURRENT, NoVersionError, current

if TYPE_CHECKING:
    import pandas as pd


class Tables:
    """Of the current checkpoints and evaluations in the home `home`. Losses are in nats per answer token."""

    def __init__(self, home: str | Path) -> None:
        self._home = Path(home).absolute()

    def losses(self) -> pd.DataFrame:
        """A row for each model, record and dataset that has it (see `evaluation.record_scores`).

        Raises NoVersionError if nothing was evaluated yet.
        """
        if evaluations := self._current("evaluations"):
            return read_losses(evaluations)
        raise NoVersionError(f"{self._home}: has no evaluation; materialize evaluation/base_model and others first")

    def matrix(self) -> pd.DataFrame:
        """The loss of each model on all datasets together and on each, on records that all were scored on."""
        return loss_matrix(common_records(self.losses()))

    def curves(self) -> pd.DataFrame:
        """A row for each job and round: `val_loss` of the global model, and what it had taken to know it.

        `records` were trained on by then, `bytes` sent by all sites and to them, `seconds` had passed since the job's
        start; bytes and seconds of jobs of an earlier version of this package are <NA>. `validation_split` is the
        digest of what the model was scored on: only curves over one split compare.
        """
        import pandas as pd

        columns = ["job", "kind", "validation_split", "round", "records", "bytes", "seconds", "val_loss"]
        rows = [
            (report.job, report.kind, report.validation_digest, *values)
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
        return pd.DataFrame(rows, columns=columns).astype({"bytes": "Int64", "seconds": "Float64"})

    def budgets(self) -> pd.DataFrame:
        """A row for each job with what it cost (see `evaluation.budgets.budgets`)."""
        return budgets(self._reports)

    def traffic(self) -> pd.DataFrame:
        """A row for each job and site: bytes up, from the site to the server, and down (see `evaluation.budgets`)."""
        return traffic(self._reports)

    @cached_property
    def _reports(self) -> list[JobReport]:
        return [JobReport.read(version) for version in self._current("checkpoints")]

    def _current(self, group: str) -> list[Path]:
        """The current version of each family of the group that has one."""
        families = sorted((self._home / group).glob("*/"))
        return [current(family) for family in families if (family / CURRENT).is_symlink()]
