"""A home that was moved: MLflow finds everything at the new place, and what was written about others stays."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.tracking.record import Ending, Registration, TrackedExecution
from fedsft_assets.tracking.relocation import path_replacer, relocate
from fedsft_assets_tests.tracking.examples import tracking_record

NAMES = ["home", "a b", "ü ß", "50% off", "q\"'\\", "$x;#&*[(y)]"]


def _fill(store: Store, database: Path) -> None:
    """A home with all that MLflow says a place in: an experiment, a run, a dataset, a model and a version of it."""
    from mlflow.entities import Dataset, DatasetInput, LoggedModelStatus

    store.home.mkdir(parents=True)
    shutil.copyfile(database, store.home / "mlflow.db")
    client = Tracking(store.mlflow_uri, store.mlflow_artifacts).client()
    experiment = Tracking(store.mlflow_uri, store.mlflow_artifacts).experiment_id()
    archive = store.checkpoint("fedavg") / "model.nemo"
    archive.parent.mkdir(parents=True)
    archive.write_text("weights")
    run = client.create_run(
        experiment, tags={"checkpoint.path": str(archive), "other": f"{store.home}-2/x"}
    ).info.run_id
    client.log_text(run, json.dumps({"checkpoint.path": str(archive)}), "checkpoint.json")
    client.log_param(run, "site", json.dumps({"folder": str(store.home)}))
    source = json.dumps({"uri": str(store.combined / "testing.jsonl")})
    client.log_inputs(run, [DatasetInput(Dataset("combined", "abc", "local", source))])
    model = client.create_logged_model(experiment, name="checkpoint", source_run_id=run)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.create_registered_model("fedsft-tiny")
    client.create_model_version("fedsft-tiny", archive.as_uri(), run, tags={"archive": str(archive)})


def _everything(store: Store) -> str:
    with closing(sqlite3.connect(store.home / "mlflow.db")) as database:
        return "\n".join(database.iterdump())


@pytest.mark.parametrize(("old", "new"), zip(NAMES, reversed(NAMES), strict=True))
def test_everything_in_mlflow_is_at_the_new_place(
    tmp_path: Path, empty_mlflow_database: Path, old: str, new: str
) -> None:
    before, store = Store(tmp_path / "old" / old), Store(tmp_path / "new" / new)
    _fill(before, empty_mlflow_database)
    expected = Store(tmp_path / "new" / new)
    store.home.parent.mkdir()
    before.home.rename(store.home)
    assert relocate(store, before.home) == 10

    client = Tracking(store.mlflow_uri).client()
    experiment = client.get_experiment_by_name("fedsft")
    assert experiment.artifact_location == expected.mlflow_artifacts.as_uri()
    (run,) = client.search_runs([experiment.experiment_id])
    archive = store.checkpoint("fedavg") / "model.nemo"
    content = json.loads(Path(client.download_artifacts(run.info.run_id, "checkpoint.json")).read_text())
    assert content == {"checkpoint.path": str(archive)}
    assert run.data.tags["checkpoint.path"] == str(archive)
    assert run.data.tags["other"] == f"{before.home}-2/x"
    assert json.loads(run.data.params["site"]) == {"folder": str(store.home)}
    (used,) = run.inputs.dataset_inputs
    assert json.loads(used.dataset.source) == {"uri": str(store.combined / "testing.jsonl")}
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert model.artifact_location.startswith(f"{expected.mlflow_artifacts.as_uri()}/")
    (version,) = client.search_model_versions()
    assert version.source == archive.as_uri()
    assert version.tags["archive"] == str(archive)
    assert client.get_model_version_download_uri("fedsft-tiny", version.version) == archive.as_uri()

    whole = _everything(store)
    assert relocate(store, before.home) == 0
    assert _everything(store) == whole


def test_what_waits_for_the_tracking_server_is_at_the_new_place(tmp_path: Path) -> None:
    before, store = Store(tmp_path / "a b"), Store(tmp_path / "ü")
    archive = str(before.checkpoint("fedavg") / "model.nemo")
    ending = Ending(
        "FINISHED", 1.0, tags={"checkpoint.path": archive}, registration=Registration("m", archive, "", 1, "")
    )
    entry = before.outbox / "one"
    ending.write(entry / "ending.json")
    execution = TrackedExecution("one", "fedavg", ["site-1"], {}, {}, f"in {before.home}/jobs", 1.0)
    execution.write(tracking_record(before))
    before.home.rename(store.home)
    assert relocate(store, before.home) == 2
    moved = Ending.read(store.outbox / "one" / "ending.json")
    assert moved.registration
    assert moved.registration.archive == moved.tags["checkpoint.path"] == str(store.checkpoint("fedavg") / "model.nemo")
    assert TrackedExecution.read(tracking_record(store)).note == f"in {store.home}/jobs"


def test_nothing_changes_in_a_database_that_cannot_be_changed_as_a_whole(
    tmp_path: Path, empty_mlflow_database: Path
) -> None:
    store = Store(tmp_path / "home")
    _fill(store, empty_mlflow_database)
    refuse = "CREATE TRIGGER refuse BEFORE UPDATE ON model_versions BEGIN SELECT RAISE(ABORT, 'no'); END"
    with closing(sqlite3.connect(store.home / "mlflow.db")) as database:
        database.execute(refuse)
    whole = _everything(store)
    store.home.rename(tmp_path / "moved")
    with pytest.raises(sqlite3.IntegrityError):
        relocate(Store(tmp_path / "moved"), store.home)
    assert _everything(Store(tmp_path / "moved")) == whole


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("/a/b", "/a/b c"),
        ("/a/b/x y", "/a/b c/x y"),
        ("file:///a/b/x", "file:///a/b%20c/x"),
        ("sqlite:////a/b/mlflow.db", "sqlite:////a/b/mlflow.db"),
        ("in /a/b/x, and '/a/b'", "in /a/b c/x, and '/a/b c'"),
        ('{"x": "/a/b/x", "y": ["/a/b"]}', '{"x": "/a/b c/x", "y": ["/a/b c"]}'),
        ("/a/b c/x", "/a/b c/x"),
        ("/a/b-2/x", "/a/b-2/x"),
        ("/a/bc", "/a/bc"),
        ("/z/a/b/x", "/z/a/b/x"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("file:///z/a/b", "file:///z/a/b"),
        ("https://a/b", "https://a/b"),
        ("", ""),
    ],
)
def test_only_the_place_itself_is_replaced(text: str, moved: str) -> None:
    assert path_replacer(Path("/a/b"), Path("/a/b c"))(text) == moved
