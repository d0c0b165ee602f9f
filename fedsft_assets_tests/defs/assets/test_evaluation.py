"""The assets `evaluation/…` and `comparison`: all models are scored alike, whatever their jobs were trained with."""

from dataclasses import replace

import dagster as dg
import pytest

from fedsft_assets.defs.assets.comparison import comparison_asset
from fedsft_assets.defs.assets.evaluation import base_model_evaluation_asset, evaluation_asset
from fedsft_assets.defs.resources import resources
from fedsft_assets.evaluation.sample_answers import SAMPLE_RECORDS, read_answers, sample
from fedsft_assets.evaluation.tables import Tables
from fedsft_assets.evaluation.tasks import TaskReport, TaskResult
from fedsft_assets.execution import CheckpointInputs
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.process_env import DAGSTER_PAGES
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store, archive_file
from fedsft_assets.tracking import Outbox, Tracking
from fedsft_assets.tracking.delivery import EXECUTION_TAG
from fedsft_assets.versions import Verdict, current, judge
from fedsft_assets_tests.federation.protocol.test_job_report import REPORT
from fedsft_assets_tests.prepared import TINY, build_job, made_current, prepare_home
from fedsft_assets_tests.shipped import DATASETS

JOBS = ("alpaca", "fedavg")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A home with two checkpoints, both of the base model's weights; `fedavg` was trained on short records."""
    store = prepare_home(tmp_path_factory.mktemp("home"))
    base = archive_file(current(store.base_model(TINY.name)))
    digest = content_digest(base)
    for job, longest in zip(JOBS, (None, 16), strict=True):
        build_job(store, job, max_length=longest)
        folder = JobFolder.read(current(store.job_folder(job)))
        with made_current(store.checkpoint(job)) as checkpoint:
            (checkpoint / MODEL_FILE).write_bytes(base.read_bytes())
            report = replace(REPORT, job=job, kind=folder.spec.kind, checkpoint_digest=digest, base_model_digest=digest)
            report.write(checkpoint)
            CheckpointInputs.of(folder).write(checkpoint)
    judge(current(store.combined), Verdict())
    return store


def _materialize(store: Store) -> dg.ExecuteInProcessResult:
    jobs = [JobSpec.load(PROJECT / "jobs" / f"{job}.yaml", list(DATASETS)) for job in JOBS]
    keys = [dg.AssetKey("base_model"), dg.AssetKey("combined"), *(dg.AssetKey(["checkpoint", job]) for job in JOBS)]
    there = [dg.AssetSpec(key).with_io_manager_key("io_manager") for key in keys]
    return dg.materialize(
        [
            *there,
            base_model_evaluation_asset(),
            *map(evaluation_asset, jobs),
            comparison_asset(jobs, list(DATASETS.values())),
        ],
        resources=resources(Settings(home=store.home)),
        raise_on_error=False,
    )


def test_models_are_scored_alike_whatever_their_jobs_were_trained_with(store: Store) -> None:
    assert _materialize(store).success
    tables = Tables(store.home)
    losses = tables.losses()
    assert losses["model"].unique().tolist() == ["alpaca", "base_model", "fedavg"]
    assert (losses.groupby(["dataset", "record"])["tokens"].nunique() == 1).all()
    matrix = tables.matrix()
    assert (matrix.max() - matrix.min()).max() < 1e-6  # they have the same weights


def test_comparison_has_a_report_with_answers_of_all_models_to_the_same_records(store: Store) -> None:
    result = _materialize(store)
    (materialization,) = result.asset_materializations_for_node("comparison")
    report = current(store.report("comparison")) / "report.html"
    assert materialization.metadata["report"].value == str(report)
    page = report.read_text(encoding="utf-8")
    assert "the embedded sample" in page
    answers = read_answers([current(store.evaluation(model)) for model in ("base_model", *JOBS)])
    sampled = {tuple(one.record for one in found) for found in answers.values()}
    assert sampled == {tuple(sample(current(store.combined)))}
    assert {len(found) for found in answers.values()} == {SAMPLE_RECORDS}
    assert "| answers to 20 test records" in (report.parent / "comparison.md").read_text(encoding="utf-8")


def test_comparison_shows_what_the_home_keeps_of_benchmark_tasks(store: Store) -> None:
    digest = JobReport.read(current(store.checkpoint("fedavg"))).checkpoint_digest
    result = TaskResult("piqa", "acc", 0.625, 0.01, 50, 1838, 0, "1.0", "lm-eval 0.4.13")
    TaskReport(digest, (result,)).add_to(store.tasks(digest))
    assert _materialize(store).success
    version = current(store.report("comparison"))
    assert "0.6250 ± 0.0100" in (version / "report.html").read_text(encoding="utf-8")
    assert "0.6250 ± 0.0100" in (version / "comparison.md").read_text(encoding="utf-8")


def test_mlflow_has_one_run_of_a_comparison_with_its_intervals_and_report(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DAGSTER_PAGES, "http://127.0.0.1:3000")
    for _ in range(2):
        assert _materialize(store).success
    tracking, version = Tracking.of(Settings(home=store.home)), current(store.report("comparison"))
    client = tracking.client()
    query = f"tags.`{EXECUTION_TAG}` = '{version.name}'"
    (run,) = client.search_runs([tracking.experiment_id()], query)
    assert (run.info.run_name, run.info.status) == ("comparison", "FINISHED")
    assert run.data.tags["dagster.asset"] == "comparison"
    assert run.data.tags["dagster.run_url"] == f"http://127.0.0.1:3000/runs/{run.data.tags['dagster.run_id']}"
    for model in ("fedavg", "base_model"):
        low, value, high = (run.data.metrics[f"system/study_{model}_test_loss{end}"] for end in ("_low", "", "_high"))
        assert low < value < high
    assert len(client.get_metric_history(run.info.run_id, "system/study_fedavg_test_loss")) == 1
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"report.html", "comparison.md", "comparison.png"}
    assert Outbox(store.outbox).entries() == []


def test_each_evaluation_waits_for_its_model_and_the_splits() -> None:
    spec = JobSpec.load(PROJECT / "jobs" / "fedavg.yaml", list(DATASETS))
    asset = evaluation_asset(spec)
    assert {key.to_user_string() for key in asset.asset_deps[asset.key]} == {"checkpoint/fedavg", "combined"}
