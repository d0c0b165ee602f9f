"""Starting a job's supervisor when it cannot even begin; whole jobs are in the end-to-end tests."""

from pathlib import Path

import pytest

from fedsft_assets.federation.launch import JobError, run_job
from fedsft_assets.federation.processes import marked_processes


def test_job_folder_that_does_not_exist_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    missing, workspace = tmp_path / "job_folders" / "fedavg", tmp_path / "flare" / "fedavg"
    with pytest.raises(JobError) as failure:
        list(run_job(missing, workspace, tmp_path / "testing.jsonl", tmp_path / "checkpoint"))
    assert "the supervisor of the job ended with exit code 1" in str(failure.value)
    assert f"No such file or directory: '{missing / 'job.json'}'" in str(failure.value)
    assert marked_processes(str(workspace)) == []
    assert not (tmp_path / "checkpoint").exists()
