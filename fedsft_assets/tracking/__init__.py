"""Delivers the curves of jobs to MLflow and TensorBoard. Training never waits for either.

Points are read from the job's journal. A thread of `TrackedJob` sends each one to MLflow exactly once, even if the
tracking server or this process fails; what is undelivered when a job ends is kept in the `Outbox`.
"""

from fedsft_assets.tracking.mlflow_store import CHALLENGER, CHAMPION, EXPERIMENT, Tracking, registered_model
from fedsft_assets.tracking.outbox import Outbox
from fedsft_assets.tracking.tracked_job import Registered, TrackedJob

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "EXPERIMENT",
    "Outbox",
    "Registered",
    "TrackedJob",
    "Tracking",
    "registered_model",
]
