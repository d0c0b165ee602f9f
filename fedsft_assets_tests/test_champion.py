"""Evaluations of a study move the champion in MLflow; one that is none of its checkpoints is scored again."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from fedsft_assets.champion import move_champion
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.evaluation.champion import CHAMPION as RESCORED
from fedsft_assets.evaluation.record_scores import LOSSES_FILE, Evaluation, evaluate, read_losses
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.specs.job import BASE_MODEL, TrainingSpec
from fedsft_assets.store import Store, archive_file
from fedsft_assets.tracking import CHALLENGER, CHAMPION, Outbox, Tracking
from fedsft_assets.versions import adding, current, versions_of
from fedsft_assets_tests.prepared import TINY, made_current, prepare_home
from fedsft_assets_tests.tracking.server import HOST, unused_port

pytestmark = pytest.mark.slow

MODEL = "fedsft-tiny"
TRAINING = TINY.resolve(TrainingSpec())
LOSSES = {"alpaca": 0.9, "fedavg": 0.5}  # of the base model's


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_database: Path) -> Path:
    """A home with an evaluation of the base model, and of two jobs whose losses are lower by a factor."""
    store = prepare_home(tmp_path_factory.mktemp("home"))
    shutil.copyfile(empty_mlflow_database, store.home / "mlflow.db")
    base, combined = archive_file(current(store.base_model(TINY.name))), current(store.combined)
    losses = evaluate(LanguageModel.load(base), store, combined, TRAINING)
    digests = {BASE_MODEL: content_digest(base), **{job: f"digest of {job}" for job in LOSSES}}
    for model, digest in digests.items():
        with made_current(store.evaluation(model)) as folder:
            table = losses.assign(loss=losses["loss"] * LOSSES.get(model, 1.0))
            table.to_parquet(folder / LOSSES_FILE, index=False)
            Evaluation(model, digest, SplitReport.read(combined).digest, TRAINING.max_length).write(folder)
    with made_current(store.checkpoint("dolly")) as checkpoint:  # of another study, with the base model's weights
        shutil.copyfile(base, checkpoint / "model.nemo")
    return store.home


@pytest.fixture
def store(home: Path, tmp_path: Path) -> Store:
    shutil.copytree(home, tmp_path / "copy", symlinks=True)
    return Store(tmp_path / "copy")


@pytest.fixture
def tracking(store: Store) -> Tracking:
    return Tracking(store.mlflow_uri, store.mlflow_artifacts)


def _register(tracking: Tracking, digest: str, archive: Path) -> str:
    client = tracking.client()
    if not client.search_registered_models(f"name = '{MODEL}'"):
        client.create_registered_model(MODEL)
    tags = {"digest": digest, "archive": str(archive), "job": archive.parent.parent.name}
    return str(client.create_model_version(MODEL, archive.as_uri(), tags=tags, await_creation_for=0).version)


def _register_jobs(tracking: Tracking, store: Store) -> None:
    for job in LOSSES:
        _register(tracking, f"digest of {job}", store.checkpoint(job) / "version" / "model.nemo")


def _evaluations(store: Store) -> list[Path]:
    return [current(store.evaluation(model)) for model in (BASE_MODEL, *LOSSES)]


def _aliases(tracking: Tracking) -> dict[str, str]:
    return {alias: str(version) for alias, version in tracking.client().get_registered_model(MODEL).aliases.items()}


def test_best_job_becomes_champion_and_stays_it(tracking: Tracking, store: Store) -> None:
    _register_jobs(tracking, store)
    for said in ("fedavg is better than the base model", "stays the champion"):
        made = move_champion(_evaluations(store), store, TINY, tracking)
        assert made.reasons["digest of fedavg"].startswith(said)
        assert _aliases(tracking) == {CHAMPION: "2", CHALLENGER: "1"}
    assert Outbox(store.outbox).is_empty
    assert versions_of(store.evaluation(RESCORED)) == []


def test_champion_of_another_split_is_scored_again_before_it_is_compared(tracking: Tracking, store: Store) -> None:
    archive = current(store.checkpoint("dolly")) / "model.nemo"
    version = _register(tracking, content_digest(archive), archive)
    tracking.client().set_registered_model_alias(MODEL, CHAMPION, version)
    _register_jobs(tracking, store)
    before = Evaluation(RESCORED, content_digest(archive), "another split", TRAINING.max_length)
    with adding(store.evaluation(RESCORED)) as earlier:
        shutil.copyfile(current(store.evaluation("fedavg")) / LOSSES_FILE, earlier.folder / LOSSES_FILE)
        before.write(earlier.folder)
    made = move_champion(_evaluations(store), store, TINY, tracking)
    (again,) = [one for one in versions_of(store.evaluation(RESCORED)) if Evaluation.read(one) != before]
    pd.testing.assert_frame_equal(
        read_losses([again]).drop(columns="model"),
        read_losses([current(store.evaluation(BASE_MODEL))]).drop(columns="model"),
    )
    assert "fedavg is better than the champion" in made.reasons["digest of fedavg"]
    assert _aliases(tracking) == {CHAMPION: "3", CHALLENGER: "2"}
    tracking.client().set_registered_model_alias(MODEL, CHAMPION, version)
    written = again.stat().st_mtime_ns
    move_champion(_evaluations(store), store, TINY, tracking)
    assert again.stat().st_mtime_ns == written
    assert len(versions_of(store.evaluation(RESCORED))) == 2


def test_champion_that_cannot_be_scored_stays(tracking: Tracking, store: Store) -> None:
    version = _register(tracking, "gone", store.checkpoint("oasst1") / "version" / "model.nemo")
    tracking.client().set_registered_model_alias(MODEL, CHAMPION, version)
    _register_jobs(tracking, store)
    made = move_champion(_evaluations(store), store, TINY, tracking)
    assert "does not exist on this machine" in made.reasons["digest of fedavg"]
    assert _aliases(tracking) == {CHAMPION: "1", CHALLENGER: "3"}


def test_decision_is_kept_for_a_server_that_is_down(
    tracking: Tracking, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    _register_jobs(tracking, store)
    made = move_champion(_evaluations(store), store, TINY, Tracking(f"http://{HOST}:{unused_port()}", patience=0.5))
    assert made.champion == "digest of fedavg"
    assert "delivered by `fedsft track`" in caplog.text
    assert _aliases(tracking) == {}
    assert Outbox(store.outbox).deliver(tracking) == []
    assert _aliases(tracking) == {CHAMPION: "2", CHALLENGER: "1"}
