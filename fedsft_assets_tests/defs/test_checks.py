"""Asset checks in Dagster: what they find, what they say, and whether they stop what is downstream."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import dagster as dg
import pytest

from fedsft_assets.data.combine import combine
from fedsft_assets.data.records import Record, dump_records, read_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.defs.assets import splits
from fedsft_assets.defs.assets.job_folder import job_folder_asset
from fedsft_assets.defs.assets.raw import raw_asset
from fedsft_assets.defs.assets.splits import combined_asset, processed_asset
from fedsft_assets.defs.checks import CHECKS, data_checks
from fedsft_assets.defs.resources import resources
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.model.preset_tokenizer import preset_tokenizer
from fedsft_assets.settings import Settings
from fedsft_assets.specs.dataset import ColumnsSpec, DatasetSpec
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.specs.limits import CheckName, CheckSettings
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import NoVersionError, accept, current, read_verdict
from fedsft_assets_tests.prepared import made_current
from fedsft_assets_tests.shipped import DATASETS

_DOWNSTREAM = dg.AssetKey(["job_folder", "study"])


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file in place of each histogram: drawing one takes longer than all else that a small run does."""

    def draw_nothing(_lengths: object, _window: int, _title: str, into: Path) -> None:
        into.parent.mkdir(parents=True, exist_ok=True)
        into.touch()

    monkeypatch.setattr(splits, "plot_lengths", draw_nothing)


@dg.asset(name="base_model")
def _base_model() -> None:
    """Stands for the one of the home, which is never materialized here."""


class Study:
    """Data assets, their checks and a job folder, over a home and an instance of the test's own."""

    def __init__(
        self, home: Path, instance: dg.DagsterInstance, datasets: list[DatasetSpec], data: str, model: str = "tiny"
    ) -> None:
        self.store = Store(home)
        self.instance = instance
        self._data = data
        self._model = model
        with made_current(self.store.base_model(Path(model).name)) as base_model:
            (base_model / f"{Path(model).name}.nemo").write_text("nobody reads it")
        job = JobSpec(name="study", description="a study", sites={"site-1": SiteSpec(dataset="combined")}, rounds=1)
        self._assets = [*map(raw_asset, datasets), *map(processed_asset, datasets), combined_asset(datasets)]
        self._checks = data_checks(datasets)
        self._job_folder = job_folder_asset(job)

    def run(
        self, selection: dg.AssetSelection | None = None, run_config: dict[str, Any] | None = None, **checks: Any
    ) -> dg.ExecuteInProcessResult:
        """One Dagster run with these CheckSettings, of everything if nothing is selected."""
        settings = Settings(home=self.store.home, data=self._data, model=self._model, checks=CheckSettings(**checks))
        return dg.materialize(
            [*self._assets, _base_model, self._job_folder, *self._checks],
            instance=self.instance,
            resources=resources(settings),
            selection=selection,
            run_config=run_config,
            raise_on_error=False,
        )

    def check(self, dataset: str, **checks: Any) -> dg.ExecuteInProcessResult:
        """One Dagster run of a dataset's checks alone."""
        return self.run(dg.AssetSelection.checks_for_assets(_key(dataset)), **checks)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


class Mine(Study):
    """A study of one dataset of the user's, whose rows can change, with a model of the user's."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, model: Path) -> None:
        columns = ColumnsSpec(instruction="question", response="answer")
        self._path = folder / "mine.jsonl"
        self._dataset = DatasetSpec(name="mine", path=self._path, format="jsonl", columns=columns)
        super().__init__(folder / "home", instance, [self._dataset], data="sample", model=str(model))

    def write(self, rows: list[tuple[str, str]]) -> None:
        lines = (json.dumps({"question": question, "answer": answer}) for question, answer in rows)
        self._path.write_text("\n".join(lines), encoding="utf-8")

    def split(self) -> None:
        """Make the splits without Dagster."""
        with made_current(self.store.processed("mine")) as splits:
            split_dataset(self._dataset, self._path.parent, splits)
        with made_current(self.store.combined) as combined:
            combine([self.splits], combined)

    @property
    def splits(self) -> Path:
        """The current version of the dataset's splits."""
        return current(self.store.processed("mine"))

    def remake(self, questions: int, **checks: Any) -> dg.ExecuteInProcessResult:
        """One Dagster run of raw data with so many rows, of its splits and their checks."""
        self.write(_questions(questions))
        return self.run(dg.AssetSelection.assets(["raw", "mine"], _key("mine")), **checks)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the tiny preset's tokenizer, which then need not be trained for every asset."""
    folder = tmp_path_factory.mktemp("models") / "ours"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    preset_tokenizer(PRESETS["tiny"], folder).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def mine(tmp_path: Path, instance: dg.DagsterInstance, model: Path) -> Mine:
    study = Mine(tmp_path, instance, model)
    study.write(_questions(200))
    return study


def _questions(count: int) -> list[tuple[str, str]]:
    return [(f"What do you get when you double {n}?", f"You get {2 * n} as the answer.") for n in range(count)]


def _key(dataset: str) -> dg.AssetKey:
    return dg.AssetKey(["combined"] if dataset == "combined" else ["processed", dataset])


def _found(result: dg.ExecuteInProcessResult, dataset: str, check: CheckName) -> dg.AssetCheckEvaluation:
    (found,) = (
        evaluation
        for evaluation in result.get_asset_check_evaluations()
        if (evaluation.asset_key, evaluation.check_name) == (_key(dataset), check)
    )
    return found


def _failed(result: dg.ExecuteInProcessResult) -> set[tuple[str, str]]:
    """The checks that failed, as error or warning."""
    return {
        (evaluation.asset_key.path[-1], evaluation.check_name)
        for evaluation in result.get_asset_check_evaluations()
        if not evaluation.passed
    }


def _numbers(evaluation: dg.AssetCheckEvaluation) -> dict[str, int | float]:
    values = {name: value.value for name, value in evaluation.metadata.items()}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _materialized(result: dg.ExecuteInProcessResult) -> set[dg.AssetKey | None]:
    """But for the base model, which stands for the one of the home."""
    return {event.asset_key for event in result.get_asset_materialization_events()} - {dg.AssetKey("base_model")}


def _spoil(path: Path, *records: Record) -> None:
    """Put these records at the end of a split, as nothing of the project would."""
    path.write_bytes(path.read_bytes() + dump_records(list(records)))


def test_the_embedded_sample_passes_every_check(tmp_path: Path, instance: dg.DagsterInstance, source: Path) -> None:
    result = Study(tmp_path / "home", instance, list(DATASETS.values()), str(source)).run()
    assert result.success
    assert _DOWNSTREAM in _materialized(result)
    evaluations = result.get_asset_check_evaluations()
    assert len(evaluations) == (len(DATASETS) + 1) * len(get_args(CheckName))
    assert _failed(result) == set()
    for evaluation in evaluations:
        assert evaluation.blocking
        assert evaluation.description
        assert evaluation.description.endswith(".")
        assert _numbers(evaluation)


def test_real_rows_pass_every_check_but_are_long_for_the_tiny_model(
    tmp_path: Path, instance: dg.DagsterInstance, real_samples: Path
) -> None:
    result = Study(tmp_path / "home", instance, list(DATASETS.values()), str(real_samples)).run()
    assert result.success
    assert {check for _, check in _failed(result)} == {"token_lengths"}
    assert _DOWNSTREAM in _materialized(result)


def test_a_dataset_has_all_checks_in_one_step() -> None:
    for checks in data_checks(list(DATASETS.values())):
        assert {key.name for key in checks.check_keys} == set(get_args(CheckName)) == set(CHECKS)
        assert len({key.asset_key for key in checks.check_keys}) == 1


def test_the_checks_of_combined_wait_for_every_dataset() -> None:
    (checks,) = (checks for checks in data_checks(list(DATASETS.values())) if "combined" in checks.op.name)
    for spec in checks.check_specs:
        assert {dep.asset_key for dep in spec.additional_deps} == {_key(name) for name in DATASETS}


def test_a_shrunken_dataset_is_refused_and_trained_on_by_nothing(mine: Mine) -> None:
    assert mine.run().success
    mine.write(_questions(60))
    result = mine.run()
    assert not result.success
    assert _failed(result) == {("mine", "row_count")}
    assert _materialized(result) == {dg.AssetKey(["raw", "mine"]), _key("mine")}
    found = _found(result, "mine", "row_count")
    assert found.severity == dg.AssetCheckSeverity.ERROR
    assert found.description == (
        "60 records, 0.3 times the 200 of the current version; expected 0.5 to 10 times; check the raw data, or "
        "accept this version if it is intended: fedsft accept mine row_count, or `accept` in the launchpad."
    )
    assert _numbers(found) == {"records": 60, "records before": 200, "ratio": 0.3}


def _job_folder_trains_on(mine: Mine) -> Path:
    """The splits that the job folder was built on last."""
    (plan, *_) = JobFolder.read(current(mine.store.job_folder("study"))).plans
    return plan.located(mine.store.home).training_file.parent


def test_what_was_good_stays_current_for_everybody_while_new_data_is_refused(mine: Mine) -> None:
    mine.run()
    good, combined = mine.splits, current(mine.store.combined)
    mine.write(_questions(60))
    assert not mine.run().success
    assert mine.splits == good

    downstream = dg.AssetSelection.assets("combined", _DOWNSTREAM) | dg.AssetSelection.checks_for_assets("combined")
    assert mine.run(downstream).success
    assert _job_folder_trains_on(mine) == combined


def test_data_whose_checks_never_ran_is_neither_current_nor_trained_on(mine: Mine) -> None:
    mine.run()
    good = mine.splits
    mine.write(_questions(180))
    unchecked = dg.AssetSelection.assets(["raw", "mine"], _key("mine"), "combined").without_checks()
    result = mine.run(unchecked)
    assert not result.success
    (failure,) = result.get_step_failure_events()
    assert failure.step_key == "combined"
    said = failure.step_failure_data.user_failure_data
    assert said is not None
    assert said.description is not None
    assert said.description.endswith("its checks have not run; run them, or materialize the asset with its checks")
    assert mine.splits == good


def test_refused_data_can_be_accepted_in_the_launchpad_and_that_is_recorded(mine: Mine) -> None:
    mine.remake(200)
    accept = {"ops": {"check__processed__mine": {"config": {"accept": ["row_count"]}}}}
    mine.write(_questions(60))
    result = mine.run(run_config=accept)
    assert result.success
    found = _found(result, "mine", "row_count")
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert found.description is not None
    assert found.description.startswith("Accepted: 60 records, 0.3 times the 200 of the current version")
    verdict = read_verdict(mine.splits)
    assert verdict is not None
    assert verdict.accepted == ["row_count"]
    assert verdict.by == f"Dagster run {result.run_id}"
    assert SplitReport.read(mine.splits).records == 60


def test_a_check_that_does_not_exist_cannot_be_accepted(mine: Mine) -> None:
    result = mine.run(run_config={"ops": {"check__processed__mine": {"config": {"accept": ["rows"]}}}})
    (failure,) = result.get_step_failure_events()
    said = failure.step_failure_data.user_failure_data
    assert said is not None
    assert said.description is not None
    assert said.description.startswith("accept: rows is not a check; expected one of row_count, ")


def test_refused_data_can_be_accepted_by_a_command_that_names_the_check(mine: Mine) -> None:
    mine.remake(200)
    assert not mine.remake(60).success
    versions = mine.store.processed("mine")
    with pytest.raises(NoVersionError, match=r"failed row_count, not duplicates; name all failed checks$"):
        accept(versions, ["duplicates"], "me")
    version = accept(versions, ["row_count"], "me")
    assert mine.splits == version
    assert SplitReport.read(version).records == 60
    verdict = read_verdict(version)
    assert verdict is not None
    assert (verdict.accepted, verdict.by) == (["row_count"], "me")
    assert mine.run(dg.AssetSelection.assets("combined", _DOWNSTREAM)).success
    with pytest.raises(NoVersionError, match="no version has failed its checks"):
        accept(versions, ["row_count"], "me")


def test_trying_again_does_not_let_a_shrunken_dataset_through_and_repairing_it_does(mine: Mine) -> None:
    mine.remake(200)
    for _ in range(2):
        assert not mine.remake(50).success
    repaired = mine.remake(210)
    assert repaired.success
    assert _numbers(_found(repaired, "mine", "row_count"))["records before"] == 200
    assert _numbers(_found(mine.remake(211), "mine", "row_count"))["records before"] == 210


def test_a_change_that_was_allowed_is_what_the_next_is_compared_with(mine: Mine) -> None:
    mine.remake(200)
    assert not mine.remake(60).success
    assert mine.check("mine", min_rows=0.2).success
    warned = mine.remake(20, severity={"row_count": "warn"})
    assert warned.success
    assert _numbers(_found(warned, "mine", "row_count"))["records before"] == 60
    assert not _found(warned, "mine", "row_count").passed
    assert _numbers(_found(mine.remake(21), "mine", "row_count"))["records before"] == 20


def test_checks_that_run_alone_later_find_what_they_found_in_the_run(mine: Mine, tmp_path: Path) -> None:
    (tmp_path / "dagster").mkdir()
    quiet = {"telemetry": {"enabled": False}}  # it would write to HOME
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides=quiet) as mine.instance:
        mine.remake(200)
        in_run = _found(mine.remake(60), "mine", "row_count")
        alone = mine.check("mine")
    assert not alone.success
    assert _found(alone, "mine", "row_count").description == in_run.description


def test_checks_that_first_run_alone_compare_with_the_current_version(mine: Mine) -> None:
    without_checks = dg.AssetSelection.assets(["raw", "mine"], _key("mine")).without_checks()
    mine.run(without_checks)
    assert _found(mine.check("mine"), "mine", "row_count").description == (
        "200 records; no earlier version to compare with."
    )
    mine.write(_questions(2100))
    mine.run(without_checks)
    found = _found(mine.check("mine"), "mine", "row_count")
    assert not found.passed
    assert _numbers(found) == {"records": 2100, "records before": 200, "ratio": 10.5}


def test_a_warning_lets_training_go_on_and_the_same_as_an_error_stops_it(mine: Mine) -> None:
    mine.write([*_questions(200), *_questions(20)])
    warned = mine.run()
    assert warned.success
    assert _DOWNSTREAM in _materialized(warned)
    found = _found(warned, "mine", "duplicates")
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert found.description == (
        "20 of 220 rows (9.09%) are duplicates and were removed; expected at most 5.00%; check the source "
        "for duplicated rows, or raise max_duplicates."
    )
    assert _numbers(found) == {"duplicates": 20, "rows": 220, "share": pytest.approx(1 / 11)}

    stopped = mine.run(severity={"duplicates": "error"})
    assert not stopped.success
    assert _found(stopped, "mine", "duplicates").severity == dg.AssetCheckSeverity.ERROR
    assert not {_key("combined"), _DOWNSTREAM} & _materialized(stopped)
    assert mine.run(severity={"duplicates": "error"}, max_duplicates=0.1).success


def test_an_error_on_combined_stops_the_job_folder_alone(mine: Mine) -> None:
    mine.run()
    stopped = mine.run(
        dg.AssetSelection.assets("combined", _DOWNSTREAM) | dg.AssetSelection.checks_for_assets("combined"),
        min_rows=1.1,
    )
    assert not stopped.success
    assert _materialized(stopped) == {_key("combined")}
    assert _failed(stopped) == {("combined", "row_count")}


def test_long_records_are_counted_against_the_models_window(mine: Mine) -> None:
    mine.write([*_questions(150), *((f"Tell story {n}.", f"Once upon a time {n}, " * 240) for n in range(50))])
    result = mine.run()
    assert result.success
    found = _found(result, "mine", "token_lengths")
    assert not found.passed
    assert found.description == (
        "50 of 200 records (25.00%) are longer than 1024 tokens, the window of ours; expected at most 20.00%; "
        "use a model with a longer window, or raise max_truncated."
    )
    numbers = _numbers(found)
    assert (numbers["cut"], numbers["share"], numbers["window"]) == (50, 0.25, 1024)
    assert numbers["tokens, p50"] < 1024 < numbers["tokens, p95"] <= numbers["tokens, p99"]
    assert _found(mine.check("mine", max_truncated=0.25), "mine", "token_lengths").passed


def test_records_in_other_languages_are_shown_by_language(mine: Mine) -> None:
    german = [(f"Wie koche ich {n} Eier?", "Lege sie neun Minuten in heißes Wasser.") for n in range(60)]
    mine.write([*_questions(140), *german])
    result = mine.run()
    assert result.success
    found = _found(result, "mine", "languages")
    assert not found.passed
    assert found.description == (
        "70.00% of the 200 sampled records with words are in en; expected at least 80.00%; remove the other "
        "records, or change languages or min_language_share."
    )
    assert _numbers(found) == {"share": 0.7, "sampled": 200}
    table = found.metadata["languages"]
    assert isinstance(table, dg.TableMetadataValue)
    assert [record.data for record in table.records] == [
        {"language": "en", "records": 140, "share": 0.7},
        {"language": "de", "records": 60, "share": 0.3},
    ]
    assert _found(mine.check("mine", languages=["en", "de"]), "mine", "languages").passed
    assert _found(mine.check("mine", min_language_share=0.7), "mine", "languages").passed


def test_blank_outputs_stop_what_is_downstream_and_are_named(mine: Mine) -> None:
    mine.split()
    path = split_file(mine.splits, "testing")
    lines = len(read_records(path))
    _spoil(path, Record(input="What is empty?", output=" \n"), Record(input="What is bare?", output=""))
    result = mine.run(
        dg.AssetSelection.assets("combined", _DOWNSTREAM) | dg.AssetSelection.checks_for_assets(_key("mine"))
    )
    assert not result.success
    assert _materialized(result) == set()
    found = _found(result, "mine", "no_empty_outputs")
    assert found.description == (
        f"2 records have a blank output (testing line {lines + 1}; testing line {lines + 2}); "
        "materialize the splits again."
    )
    assert _numbers(found) == {"blank": 2, "blank, training": 0, "blank, validation": 0, "blank, testing": 2}


def test_a_prompt_in_two_splits_of_a_dataset_is_an_error(mine: Mine) -> None:
    mine.split()
    folder = mine.splits
    stolen = read_records(split_file(folder, "training"))[0]["input"]
    _spoil(split_file(folder, "testing"), Record(input=stolen.upper(), output="Again."))
    result = mine.check("mine")
    assert not result.success
    assert _failed(result) == {("mine", "no_prompt_overlap")}
    found = _found(result, "mine", "no_prompt_overlap")
    assert found.description == (
        f"1 prompt is in several splits ({stolen!r} in mine/training and mine/testing); materialize all processed "
        "assets, then combined, with the same split settings."
    )
    assert _numbers(found) == {"prompts": 1}
    table = found.metadata["examples"]
    assert isinstance(table, dg.TableMetadataValue)
    assert table.records[0].data == {"prompt": stolen, "in": "mine/training, mine/testing"}


def test_combined_looks_for_prompts_in_all_datasets_together(mine: Mine) -> None:
    mine.split()
    stolen = read_records(split_file(mine.splits, "training"))[0]["input"]
    _spoil(split_file(current(mine.store.combined), "testing"), Record(input=stolen, output="Again."))
    found = _found(mine.check("combined"), "combined", "no_prompt_overlap")
    assert found.description is not None
    assert "in mine/training and combined/training and combined/testing" in found.description
    assert _found(mine.check("mine"), "mine", "no_prompt_overlap").passed


def test_splits_that_are_not_there_are_asked_for_without_a_traceback(mine: Mine) -> None:
    (failure,) = mine.check("mine").get_step_failure_events()
    data = failure.step_failure_data
    assert data.user_failure_data is not None
    assert data.user_failure_data.description is not None
    versions = mine.store.processed("mine")
    assert data.user_failure_data.description == f"{versions}: has no current version; materialize its asset first"
