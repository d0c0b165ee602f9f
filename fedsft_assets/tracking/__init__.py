"""Where the curves of jobs go: MLflow and TensorBoard. Training never waits for either of them.

A point is first of all a line of the job's journal, which others write. From there it goes to MLflow by a
thread of `TrackedJob`, each one once, whatever happens to the tracking server or to this process meanwhile;
what the server has not taken when a job ends waits in the `Outbox`.
"""

from fedsft_assets.tracking.mlflow_store import CHAMPION, EXPERIMENT, Tracking
from fedsft_assets.tracking.outbox import Outbox
from fedsft_assets.tracking.tracked_job import Registered, TrackedJob

__all__ = ["CHAMPION", "EXPERIMENT", "Outbox", "Registered", "TrackedJob", "Tracking"]
