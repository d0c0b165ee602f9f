"""Where the curves of jobs go: MLflow and TensorBoard. Training never waits for either of them.

A point is first of all a line of the job's journal, which others write. From there it goes to MLflow by a
thread of `TrackedJob`, each one once, whatever happens to the tracking server or to this process meanwhile;
what the server has not taken when a job ends waits in the `Outbox`.
"""

from fedsft_assets.tracking.job import Registered, TrackedJob
from fedsft_assets.tracking.outbox import Outbox
from fedsft_assets.tracking.server import CHAMPION, EXPERIMENT, Tracking

__all__ = ["CHAMPION", "EXPERIMENT", "Outbox", "Registered", "TrackedJob", "Tracking"]
