"""Job files and model presets: what is wrong is named by file, field, what was found and what was expected."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedsft_assets.files import file_digest
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.dataset import ConversationsSpec, DatasetSpec, load_datasets
from fedsft_assets.specs.job import (
    FedAvg,
    FedOpt,
    FedProx,
    FiltersSpec,
    JobSpec,
    Precision,
    PrivacySpec,
    Scaffold,
    TrainingSpec,
    load_jobs,
)
from fedsft_assets.specs.model_preset import PRESETS, model_preset
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets_tests.shipped import DATASETS

NAMES = list(DATASETS)
GOOD = """
description: a job
sites:
  site-1: {dataset: alpaca}
  site-2: {dataset: dolly}
rounds: 5
"""

WriteJob = Callable[..., Path]


@pytest.fixture
def write_job(tmp_path: Path) -> WriteJob:
    """Writes a job file and returns its path."""

    def write(content: str, name: str = "fedavg.yaml") -> Path:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write


def _error(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        JobSpec.load(path, NAMES)
    return str(caught.value)


def test_the_shipped_jobs_are_three_local_ones_a_centralized_and_a_federated_one() -> None:
    jobs = load_jobs(PROJECT / "jobs", NAMES)
    assert {job.name: (job.kind, job.datasets) for job in jobs} == {
        "alpaca": ("local", ["alpaca"]),
        "combined": ("centralized", ["combined"]),
        "dolly": ("local", ["dolly"]),
        "fedavg": ("federated", ["alpaca", "dolly", "oasst1"]),
        "oasst1": ("local", ["oasst1"]),
    }
    assert all(job.description for job in jobs)


def test_job_takes_its_name_from_its_file_and_defaults_for_the_rest(write_job: WriteJob) -> None:
    spec = JobSpec.load(write_job(GOOD, "my-study_2.yaml"), NAMES)
    assert (spec.name, spec.rounds, spec.local_epochs, spec.max_local_steps) == ("my-study_2", 5, 1, None)
    assert spec.training == TrainingSpec()


def test_unknown_dataset_is_named_with_those_that_there_are(write_job: WriteJob) -> None:
    path = write_job(GOOD.replace("dolly", "doly"))
    assert _error(path) == (
        f"{path}: sites.site-2.dataset: 'doly' is not a training dataset; expected one of"
        " alpaca, dolly, oasst1, combined"
    )


def test_private_dataset_is_no_dataset_of_the_study(write_job: WriteJob) -> None:
    spec = JobSpec.load(write_job(GOOD.replace("{dataset: dolly}", "{dataset: patients, private: true}")), NAMES)
    assert spec.sites["site-2"].dataset == "patients"
    assert spec.private_sites == ["site-2"]
    assert "patients" not in spec.datasets


@pytest.mark.parametrize("name", ["../patients", "a b", "combined", ""])
def test_private_dataset_has_a_name_that_a_site_can_have(write_job: WriteJob, name: str) -> None:
    path = write_job(GOOD.replace("{dataset: dolly}", f"{{dataset: {name!r}, private: true}}"))
    assert _error(path).startswith(f"{path}: sites.site-2.dataset: {name!r} is not a valid name of a private dataset")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rounds: 5", "rounds: 0", "rounds: Input should be greater than or equal to 1, found 0"),
        ("rounds: 5", "rounds: many", "rounds: Input should be a valid integer, unable to parse string"),
        ("rounds: 5", "rounds: 5\nround: 6", "round: Extra inputs are not permitted, found 6"),
        ("rounds: 5", "", "rounds: Field required"),
        ("rounds: 5", "rounds: 5\nlocal_epochs: 0", "local_epochs: Input should be greater than 0, found 0"),
        ("rounds: 5", "rounds: 5\nlocal_epochs: .inf", "local_epochs: Input should be a finite number, found inf"),
        ("rounds: 5", "rounds: 5\nsite_timeout: .nan", "site_timeout: Input should be"),
        ("dataset: dolly", "data: dolly", "sites.site-2.dataset: Field required"),
        ("{dataset: dolly}", "dolly", "sites.site-2: Input should be a valid dictionary or instance of SiteSpec"),
        (
            "rounds: 5",
            "rounds: 5\ntraining: {learning_rate: -1}",
            "training.learning_rate: Input should be greater than 0, found -1",
        ),
        (
            "rounds: 5",
            "rounds: 5\ntraining: {precision: bf16}",
            "training.precision: Input should be 'auto', '32', 'bf16-mixed' or '16-mixed', found 'bf16'",
        ),
        ("rounds: 5", "rounds: 5\ntraining: {lr: 0.1}", "training.lr: Extra inputs are not permitted, found 0.1"),
        ("site-2:", "server:", "'server' cannot name a site; use letters, digits, '-', '_', and not 'server'"),
        ("site-2:", "site/2:", "'site/2' cannot name a site"),
        ("rounds: 5", "rounds: 5\nname: other", "name: 'other' is not the file's name; remove it or write 'fedavg'"),
    ],
)
def test_wrong_field_is_named_with_what_was_found_and_expected(
    write_job: WriteJob, old: str, new: str, said: str
) -> None:
    path = write_job(GOOD.replace(old, new))
    error = _error(path)
    assert error.startswith(f"{path}: ")
    assert said in error


@pytest.mark.parametrize(
    ("said", "algorithm"),
    [
        ("", FedAvg()),
        ("algorithm: fedavg", FedAvg()),
        ("algorithm: fedprox", FedProx(name="fedprox", mu=0.01)),
        ("algorithm: {name: fedprox, mu: 0.5}", FedProx(name="fedprox", mu=0.5)),
        ("algorithm: fedopt", FedOpt(name="fedopt")),
        (
            "algorithm: {name: fedopt, optimizer: adam, learning_rate: 0.1, beta1: 0, epsilon: 1e-8}",
            FedOpt(name="fedopt", optimizer="adam", learning_rate=0.1, beta1=0.0, beta2=0.99, epsilon=1e-8),
        ),
        ("algorithm: scaffold", Scaffold(name="scaffold")),
    ],
)
def test_algorithm_is_said_by_its_name_or_with_its_fields(write_job: WriteJob, said: str, algorithm: object) -> None:
    assert JobSpec.load(write_job(GOOD + said), NAMES).algorithm == algorithm


def test_job_says_who_is_needed_how_long_to_wait_and_what_travels(write_job: WriteJob) -> None:
    spec = JobSpec.load(write_job(GOOD), NAMES)
    assert (spec.min_sites, spec.site_timeout, spec.wire, spec.filters) == (None, 1800.0, "fp32", FiltersSpec())
    said = (
        "min_sites: 1\nsite_timeout: 90\nwire: bf16-diff\n"
        "filters: {exclude: ['^lm_head', 'bias$'], privacy: {clip: 1.0, noise_multiplier: 0.5}}\n"
    )
    spec = JobSpec.load(write_job(GOOD + said), NAMES)
    assert (spec.min_sites, spec.site_timeout, spec.wire) == (1, 90.0, "bf16-diff")
    assert spec.filters.exclude == ["^lm_head", "bias$"]
    assert spec.filters.privacy == PrivacySpec(clip=1.0, noise_multiplier=0.5, delta=1e-5)


@pytest.mark.parametrize(
    ("added", "field", "said"),
    [
        ("algorithm: fedsgd", "algorithm", "'fedsgd'"),
        ("algorithm: 3", "algorithm", "found 3"),
        ("algorithm: {mu: 0.1}", "algorithm", "'name'"),
        ("algorithm: {name: fedavg, mu: 0.1}", "algorithm.fedavg.mu", "not permitted, found 0.1"),
        ("algorithm: {name: fedprox, mu: 0}", "algorithm.fedprox.mu", "greater than 0, found 0"),
        (
            "algorithm: {name: fedopt, optimizer: sgd}",
            "algorithm.fedopt.optimizer",
            "'adam' or 'momentum', found 'sgd'",
        ),
        ("algorithm: {name: fedopt, beta1: 1}", "algorithm.fedopt.beta1", "less than 1, found 1"),
        ("algorithm: {name: fedopt, beta2: -0.1}", "algorithm.fedopt.beta2", "greater than or equal to 0, found -0.1"),
        ("algorithm: {name: fedopt, epsilon: 0}", "algorithm.fedopt.epsilon", "greater than 0, found 0"),
        ("algorithm: {name: fedopt, learning_rate: 0}", "algorithm.fedopt.learning_rate", "greater than 0, found 0"),
        ("algorithm: {name: scaffold, mu: 1}", "algorithm.scaffold.mu", "not permitted, found 1"),
        ("min_sites: 0", "min_sites", "greater than or equal to 1, found 0"),
        ("min_sites: 3", "the file", "min_sites (3) exceeds the number of sites (2)"),
        ("site_timeout: 0", "site_timeout", "greater than 0, found 0"),
        ("wire: fp16", "wire", "'fp32' or 'bf16-diff', found 'fp16'"),
        ("filters: {exclude: ['lm_head(']}", "filters", "exclude: 'lm_head(' is not a regular expression: missing )"),
        ("filters: {exclude: lm_head}", "filters.exclude", "valid list, found 'lm_head'"),
        ("filters: {include: [x]}", "filters.include", "not permitted"),
        ("filters: {privacy: {clip: 0, noise_multiplier: 1}}", "filters.privacy.clip", "greater than 0, found 0"),
        ("filters: {privacy: {clip: 1}}", "filters.privacy.noise_multiplier", "Field required"),
        (
            "filters: {privacy: {clip: 1, noise_multiplier: 1, delta: 1}}",
            "filters.privacy.delta",
            "less than 1, found 1",
        ),
        (
            "filters: {privacy: {clip: 1, noise_multiplier: 1.0e-10}}",
            "filters.privacy.noise_multiplier",
            "greater than or equal to",
        ),
        *(
            (
                f"filters: {{privacy: {{clip: {clip}, noise_multiplier: {noise}}}}}",
                "filters.privacy",
                "clip times noise_multiplier is",
            )
            for clip, noise in (("1.0e+20", "1.0e+20"), ("1.0e-25", "1.0e-9"))
        ),
        ("filters: {privacy: {clip: .inf, noise_multiplier: 1}}", "filters.privacy.clip", "a finite number, found inf"),
        (
            "filters: {privacy: {clip: 1, noise_multiplier: .inf}}",
            "filters.privacy.noise_multiplier",
            "a finite number, found inf",
        ),
        (
            "algorithm: scaffold\nfilters: {privacy: {clip: 1, noise_multiplier: 1}}",
            "the file",
            "filters.privacy: scaffold also sends a site's control variate, neither clipped nor with noise",
        ),
    ],
)
def test_what_cannot_be_done_is_named_with_file_and_field(
    write_job: WriteJob, added: str, field: str, said: str
) -> None:
    path = write_job(GOOD + added)
    error = _error(path)
    assert error.startswith(f"{path}: {field}: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_every_wrong_field_has_a_line_of_its_own(write_job: WriteJob) -> None:
    path = write_job(GOOD.replace("rounds: 5", "rounds: 0\nseed: x").replace("dataset: dolly", "dataset: 7"))
    lines = _error(path).splitlines()
    assert [line.removeprefix(f"{path}: ").split(": ")[0] for line in lines] == [
        "sites.site-2.dataset",
        "rounds",
        "seed",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sites: [", "is not YAML"),
        ("a:\tb: c", "is not YAML"),
        ("", "expected fields like 'sites:' and 'rounds:', found NoneType"),
        ("- a\n- b\n", "expected fields like 'sites:' and 'rounds:', found list"),
        ("sites: {}\nrounds: 1\ndescription: x\n", "sites: Dictionary should have at least 1 item"),
    ],
)
def test_file_that_is_no_job_is_named(write_job: WriteJob, content: str, said: str) -> None:
    path = write_job(content)
    error = _error(path)
    assert error.startswith(f"{path}: ")
    assert said in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{GOOD}rounds: 6\n", "line 7: rounds: duplicate field, first in line 6; remove one"),
        (GOOD.replace("site-2", "site-1"), "line 5: site-1: duplicate field, first in line 4; remove one"),
        (
            f"{GOOD}training:\n  batch_size: 8\n  learning_rate: 0.1\n  batch_size: 4\n",
            "line 10: batch_size: duplicate field, first in line 8; remove one",
        ),
    ],
)
def test_field_that_occurs_twice_is_named_with_its_lines(write_job: WriteJob, content: str, said: str) -> None:
    path = write_job(content)
    assert _error(path) == f"{path}: {said}"


def test_what_a_merge_brings_may_be_said_again(write_job: WriteJob) -> None:
    sites = "sites:\n  site-1: &one {dataset: alpaca, private: false}\n  site-2: {<<: *one, dataset: dolly}\n"
    spec = JobSpec.load(write_job(f"description: a job\n{sites}rounds: 5\n"), NAMES)
    assert spec.datasets == ["alpaca", "dolly"]


def test_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert _error(path).startswith(f"{path}: is not YAML")


def test_file_whose_name_cannot_name_a_job_is_refused(write_job: WriteJob) -> None:
    path = write_job(GOOD, "Fed Avg.yaml")
    assert _error(path).startswith(f"{path}: name: String should match pattern")


def test_folder_without_jobs_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"{tmp_path}: has no job files"):
        load_jobs(tmp_path, NAMES)


@pytest.fixture
def spec(write_job: WriteJob) -> JobSpec:
    return JobSpec.load(write_job(GOOD + "max_local_steps: 9\ntraining: {learning_rate: 0.1}\n"), NAMES)


def test_overrides_reach_job_and_training_and_leave_the_rest(spec: JobSpec) -> None:
    changed = spec.override(rounds=2, batch_size=3, seed=None, max_local_steps=None)
    assert (changed.rounds, changed.training.batch_size) == (2, 3)
    kept = {"rounds": spec.rounds, "training": spec.training}
    assert changed.model_copy(update=kept) == spec
    assert changed.training.learning_rate == 0.1
    assert spec.rounds == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 0}, "jobs/fedavg.yaml with overrides: rounds: Input should be greater than or equal to 1, found 0"),
        ({"max_length": 4}, "training.max_length: Input should be greater than or equal to 8, found 4"),
        ({"epochs": 4}, "epochs: Extra inputs are not permitted, found 4"),
    ],
)
def test_overrides_that_do_not_fit_are_named(spec: JobSpec, changes: dict[str, int], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec.override(**changes)
    assert said in str(caught.value)


def test_preset_fills_only_what_the_job_leaves_open() -> None:
    resolved = PRESETS["tiny"].resolve(TrainingSpec(batch_size=3, weight_decay=0.5))
    assert (resolved.batch_size, resolved.weight_decay) == (3, 0.5)
    assert resolved.learning_rate == PRESETS["tiny"].learning_rate
    assert resolved.max_length == PRESETS["tiny"].max_length


def test_the_tiny_preset_computes_in_fp32_whatever_the_processor_can() -> None:
    assert PRESETS["tiny"].resolve(TrainingSpec()).precision == "32"
    assert PRESETS["tiny"].resolve(TrainingSpec(precision="bf16-mixed")).precision == "bf16-mixed"
    assert PRESETS["gpt-1.3b"].resolve(TrainingSpec()).precision == "auto"


@pytest.mark.parametrize("own", ["32", "bf16-mixed", "auto"])
def test_auto_in_a_job_file_is_no_wish_and_leaves_the_presets_precision(write_job: WriteJob, own: Precision) -> None:
    preset = replace(PRESETS["smollm2-135m"], precision=own)
    job = JobSpec.load(write_job(f"{GOOD}training: {{precision: auto}}"), NAMES)
    assert preset.resolve(job.training).precision == own
    assert preset.resolve(job.override(precision="16-mixed").training).precision == "16-mixed"
    said = JobSpec.load(write_job(f"{GOOD}training: {{precision: 32}}"), NAMES)  # in YAML, a number
    assert preset.resolve(said.training).precision == "32"


@pytest.mark.parametrize("name", list(PRESETS))
def test_preset_is_found_by_its_name(name: str) -> None:
    assert model_preset(name) is PRESETS[name]


def test_hugging_face_folder_is_a_preset_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for said in (str(folder), "my-model", "./my-model/"):
        preset = model_preset(said)
        assert (preset.name, preset.folder) == ("my-model", folder)


def test_model_that_is_neither_preset_nor_folder_is_named_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        model_preset(str(tmp_path))
    assert str(caught.value) == (
        f"FEDSFT_MODEL: '{tmp_path}' is neither a preset (tiny, smollm2-135m, gpt-1.3b, gpt-5b) nor a .nemo archive"
        " nor a folder with a config.json or a model_config.yaml"
    )


def test_an_archive_or_the_folder_of_its_files_is_a_preset_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine-1.2.nemo").write_bytes(b"")
    (tmp_path / "extracted").mkdir()
    (tmp_path / "extracted" / "model_config.yaml").write_text("")
    for place, name in ((tmp_path / "mine-1.2.nemo", "mine-1.2"), (tmp_path / "extracted", "extracted")):
        preset = model_preset(str(place))
        assert (preset.name, preset.archive, preset.published) == (name, place, None)


def test_a_published_archive_may_be_on_this_machine_already(tmp_path: Path) -> None:
    (tmp_path / "gpt.nemo").write_bytes(b"")
    preset = model_preset("gpt-1.3b", tmp_path / "gpt.nemo")
    assert preset.archive == tmp_path / "gpt.nemo"
    assert preset.published is PRESETS["gpt-1.3b"].published
    with pytest.raises(
        SpecError, match=r"FEDSFT_MODEL_PATH: .*gpt\.nemo does not apply to FEDSFT_MODEL=tiny; .*gpt-5b"
    ):
        model_preset("tiny", tmp_path / "gpt.nemo")
    with pytest.raises(SpecError, match=r"FEDSFT_MODEL_PATH: .*nothing is neither a \.nemo archive nor a folder"):
        model_preset("gpt-5b", tmp_path / "nothing")


@pytest.mark.parametrize(("name", "hidden", "heads"), [("gpt-1.3b", 2048, 16), ("gpt-5b", 4096, 32)])
def test_published_models_are_pinned_and_have_the_published_shape(name: str, hidden: int, heads: int) -> None:
    published = PRESETS[name].published
    assert published is not None
    assert re.fullmatch(r"[0-9a-f]{40}", published.revision)
    assert re.fullmatch(r"[0-9a-f]{64}", published.digest)
    assert published.sizes == {
        "num_layers": 24,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


@pytest.fixture
def plan(tmp_path: Path) -> SitePlan:
    for name in ("training", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    files = {f"{name}_file": tmp_path / f"{name}.jsonl" for name in ("training", "validation")}
    return SitePlan(
        job="fedavg",
        site="site-1",
        rounds=1,
        local_epochs=1,
        max_local_steps=None,
        max_evaluation_records=None,
        seed=1,
        training=PRESETS["tiny"].resolve(TrainingSpec()),
        base_model=tmp_path / "tiny.nemo",
        digests={field: file_digest(path) for field, path in files.items()},
        **files,
    )


def test_plan_is_the_same_after_a_trip_through_its_file(plan: SitePlan) -> None:
    assert SitePlan.model_validate_json(plan.model_dump_json()) == plan


def test_plan_accepts_the_files_that_it_was_made_for(plan: SitePlan) -> None:
    plan.verify_files()
    plan.training_file.touch()
    plan.verify_files()


def test_plan_refuses_a_file_that_has_changed(plan: SitePlan) -> None:
    plan.validation_file.write_text("validatioN")
    with pytest.raises(SpecError, match=r"site-1: validation_file: .*validation.jsonl has changed; build"):
        plan.verify_files()


def test_plan_refuses_a_file_that_is_missing(plan: SitePlan) -> None:
    plan.training_file.unlink()
    with pytest.raises(SpecError, match=r"site-1: training_file: .*training.jsonl is missing; build the data and"):
        plan.verify_files()


WriteDataset = Callable[..., Path]


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """Writes a dataset file and returns its path."""

    def write(content: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / "datasets" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    return write


def test_the_shipped_datasets_are_the_published_ones_at_pinned_commits() -> None:
    assert {name: dataset.hub for name, dataset in DATASETS.items()} == {
        "alpaca": "tatsu-lab/alpaca",
        "dolly": "databricks/databricks-dolly-15k",
        "oasst1": "OpenAssistant/oasst1",
    }
    for dataset in DATASETS.values():
        assert len(bytes.fromhex(dataset.revision)) == 20
        assert dataset.title
    assert DATASETS["oasst1"].conversations == ConversationsSpec()


def test_a_dataset_needs_a_path_and_columns_and_no_more(write_dataset: WriteDataset, tmp_path: Path) -> None:
    path = write_dataset("path: rows.csv\ncolumns: {instruction: q, response: a}\n")
    dataset = DatasetSpec.load(path)
    assert (dataset.name, dataset.format, dataset.path) == ("mine", "csv", tmp_path / "datasets" / "rows.csv")
    assert dataset.file_names == ["rows.csv"]
    (tmp_path / "rows").mkdir()
    path = write_dataset("path: ../rows\nfiles: [a/1.jsonl, 2.jsonl]\ncolumns: {instruction: q, response: a}\n")
    dataset = DatasetSpec.load(path)
    assert (dataset.format, dataset.file_names) == ("jsonl", ["a/1.jsonl", "2.jsonl"])


def test_a_dataset_may_come_from_the_hub(write_dataset: WriteDataset) -> None:
    dataset = DatasetSpec.load(
        write_dataset("hub: org/some-data\nfiles: [d.parquet]\ncolumns: {instruction: q, response: a}\n")
    )
    assert (dataset.folder, dataset.revision, dataset.format) == ("some-data", "main", "parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path: rows.csv\n", r"mine\.yaml: the file: .*columns: name the columns of 'instruction', 'response'"),
        ("path: rows.csv\ncolumns: {instruction: q}\n", r"mine\.yaml: columns\.response: Field required"),
        ("path: rows.xlsx\ncolumns: {instruction: q, response: a}\n", r"mine\.yaml: format: Field required"),
        (
            "path: r\nformat: xml\ncolumns: {instruction: q, response: a}\n",
            r"mine\.yaml: format: .*'parquet', 'jsonl', 'csv', 'json' or 'oasst1', found 'xml'",
        ),
        (
            "columns: {instruction: q, response: a}\nformat: csv\n",
            r"expected either 'path:', a file or folder, or 'hub:'",
        ),
        (
            "path: r.csv\nhub: a/b\ncolumns: {instruction: q, response: a}\n",
            r"expected either 'path:', a file or folder, or 'hub:'",
        ),
        ("hub: a/b\nformat: csv\ncolumns: {instruction: q, response: a}\n", r"files: name the files of the repository"),
        ("hub: b\nfiles: [r.csv]\ncolumns: {instruction: q, response: a}\n", r"mine\.yaml: hub: .*found 'b'"),
        (
            "hub: a/b\nfiles: [../r.csv]\ncolumns: {instruction: q, response: a}\n",
            r"files: '\.\./r\.csv' is outside the dataset's folder",
        ),
        (
            "path: r\nformat: oasst1\ncolumns: {instruction: q, response: a}\n",
            r"columns: not allowed for the format oasst1",
        ),
        (
            "path: r.csv\ncolumns: {instruction: q, response: a}\nconversations: {}\n",
            r"conversations: only allowed for the format oasst1",
        ),
        (
            "path: r\nformat: oasst1\nconversations: {context: tree}\n",
            r"mine\.yaml: conversations\.context: .*'prompt' or 'path', found 'tree'",
        ),
        ("path: r.csv\ncolumn: {instruction: q}\n", r"mine\.yaml: column: .*not permitted"),
        ("path: .\nformat: csv\ncolumns: {instruction: q, response: a}\n", r"mine\.yaml: files: .* is a folder; name"),
        ("- a\n", r"mine\.yaml: expected fields like 'path:' and 'columns:', found list"),
        ("a: [\n", r"mine\.yaml: is not YAML"),
        (
            "path: r.csv\ncolumns: {instruction: text, response: text}\n",
            r"mine\.yaml: columns: .*'text' is used for instruction and response; expected a column for each",
        ),
        (
            "path: r.csv\ncolumns: {instruction: q, context: a, response: a}\n",
            r"'a' is used for context and response;",
        ),
        (
            "path: r.csv\ncolumns: {instruction: q, context: q, response: a}\n",
            r"'q' is used for instruction and context;",
        ),
        (
            "path: .\nfiles: [a.csv, b.csv, ./a.csv]\ncolumns: {instruction: q, response: a}\n",
            r"files: 'a\.csv' is listed twice; list each file once",
        ),
        (
            "path: r.csv\ncolumns: {instruction: q, response: a}\npath: s.csv\n",
            r"mine\.yaml: line 3: path: duplicate field, first in line 1; remove one",
        ),
        (
            "path: r.csv\ncolumns: {instruction: q, response: a, 'response': b}\n",
            r"mine\.yaml: line 2: response: duplicate field, first in line 2; remove one",
        ),
    ],
)
def test_a_dataset_file_that_is_wrong_is_explained(write_dataset: WriteDataset, content: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        DatasetSpec.load(write_dataset(content))


def test_the_union_of_all_datasets_cannot_be_one(write_dataset: WriteDataset) -> None:
    path = write_dataset("path: r.csv\ncolumns: {instruction: q, response: a}\n", "combined.yaml")
    with pytest.raises(SpecError, match=r"combined\.yaml: 'combined' is the union of all datasets"):
        DatasetSpec.load(path)


@pytest.mark.parametrize("name", ["other.yml", "other.YAML"])
def test_a_file_that_would_be_passed_over_is_named(write_dataset: WriteDataset, write_job: WriteJob, name: str) -> None:
    for path in (write_dataset("path: r.csv\ncolumns: {instruction: q, response: a}\n", name), write_job(GOOD, name)):
        with pytest.raises(
            SpecError, match=rf"{path}: only files that end in \.yaml are read; rename it to other\.yaml"
        ):
            load_datasets(path.parent)
        with pytest.raises(SpecError, match=rf"{path}: only files that end in \.yaml are read"):
            load_jobs(path.parent, NAMES)


def test_a_folder_without_dataset_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=rf"{tmp_path}: has no dataset files; write one as <dataset>\.yaml"):
        load_datasets(tmp_path)
