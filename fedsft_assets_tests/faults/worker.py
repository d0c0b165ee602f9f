"""The process that executes a job, in place of a Dagster worker: `python -m … <home> <job> <runtime>`."""

import logging
import sys
from pathlib import Path

from fedsft_assets.execution import execute_job
from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.settings import Settings
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import TINY

# Exit codes: of an attempt that another one may go on with, and of one that says why none would.
LOST, REFUSED = 3, 4


def main() -> None:
    store, job = Store(Path(sys.argv[1])), sys.argv[2]
    tracking = Tracking(store.mlflow_uri, store.mlflow_artifacts)
    runtime = Settings(runtime=sys.argv[3]).where_jobs_run()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("fedsft_assets").setLevel(logging.INFO)
    try:
        execute_job(current(store.job_folder(job)), store, TINY, tracking, {}, runtime=runtime)
    except JobError as error:
        print(error, flush=True)
        sys.exit(LOST if error.retryable else REFUSED)


if __name__ == "__main__":
    main()
