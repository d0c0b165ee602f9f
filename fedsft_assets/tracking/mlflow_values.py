"""Maps points to MLflow values: run, metric name and identity.

All curves share one x axis: MLflow's `step` is the number of records trained on so far, by all sites in the job's run
and by the site in a site's child run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsft_assets.federation.protocol.costs import is_cost
from fedsft_assets.federation.protocol.points import Point

if TYPE_CHECKING:
    from mlflow.entities import Metric

JOB = ""  # role of the job's own MLflow run; the role of a site's run is its name


@dataclass(frozen=True)
class Value:
    """One value of one metric of an MLflow run. `timestamp` is in milliseconds since the epoch."""

    key: str
    value: float
    timestamp: int
    step: int

    @property
    def identity(self) -> Hashable:
        """Equal for two values if and only if MLflow treats them as the same.

        SQL has no infinity: MLflow stores the largest float instead.
        """
        return self.key, self.step, self.timestamp, _kept(self.value)

    @property
    def metric(self) -> Metric:
        from mlflow.entities import Metric

        return Metric(self.key, self.value, self.timestamp, self.step)


def _kept(value: float) -> str:
    if math.isinf(value):
        value = math.copysign(sys.float_info.max, value)
    return repr(value + 0.0)  # turns -0.0 into 0.0


def value_of(metric: Metric) -> Value:
    """Convert a metric read from MLflow."""
    return Value(metric.key, metric.value, metric.timestamp, metric.step)


def values_of(point: Point) -> list[tuple[str, Value]]:
    """The values that a point maps to, each with its role: JOB or a site's name."""
    timestamp = round(point.time * 1000)

    def value(name: str, number: float) -> Value:
        return Value(name, number, timestamp, point.samples)

    if point.site is None:
        return [(JOB, value(point.name, point.value))]
    own = [(point.site, value(point.name, point.value))]
    if point.step is None and not is_cost(point.name):
        own.append((JOB, value(f"{point.name}.{point.site}", point.value)))
    return own
