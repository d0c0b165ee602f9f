"""Benchmark tasks: the harness's own numbers, question by question, from questions in every layout that is known."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsft_assets.cli import main as cli
from fedsft_assets.evaluation.comparison import NotComparableError
from fedsft_assets.evaluation.task_data import TasksError, with_local_questions
from fedsft_assets.evaluation.tasks import TaskReport, TaskResult, log_results, score_tasks, task_table
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.huggingface.export import export_huggingface
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import made_current

_PIQA = PROJECT.parent / "shared/data/piqa"
# What the authors publish, in our wording: the files of a task, and its rows as its repository on the hub has them.
_GOALS = ["Cut bread.", "Dry wet shoes.", "Find a lost key.", "Cool a drink.", "Open a jar."]
_QUESTIONS: Mapping[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": goal, "sol1": "Use a knife with teeth.", "sol2": "Use a wet sponge all day.", "label": number % 2}
        for number, goal in enumerate(_GOALS)
    ],
    "hellaswag": [
        {
            "activity_label": "Baking bread",
            "ctx_a": f"{goal} A man stands in a kitchen.",
            "ctx_b": "he",
            "endings": ["kneads the dough.", "[title] flies off.", "paints a wall blue.", "sings to the oven."],
            "label": number % 4,
        }
        for number, goal in enumerate(_GOALS)
    ],
    "winogrande": [
        {
            "sentence": f"{goal} The cup did not fit on the shelf, because the _ was too large.",
            "option1": "cup",
            "option2": "shelf",
            "answer": str(1 + number % 2),
        }
        for number, goal in enumerate(_GOALS)
    ],
}
_FILES = {"piqa": "valid.jsonl", "hellaswag": "hellaswag_val.jsonl", "winogrande": "dev.jsonl"}


def _published(folder: Path) -> Path:
    """The questions in the files of their authors, each task in a folder of its own."""
    for task, rows in _QUESTIONS.items():
        (folder / task).mkdir(parents=True)
        if task == "piqa":
            (folder / task / "valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows))
        apart = {"label"} if task == "piqa" else set()
        published = [{key: value for key, value in row.items() if key not in apart} for row in rows]
        (folder / task / _FILES[task]).write_text("".join(json.dumps(row) + "\n" for row in published))
    return folder


def _copied(folder: Path) -> Path:
    """The same as copies of their repositories on the hub, where each split is a Parquet file."""
    from datasets import Dataset

    for task, rows in _QUESTIONS.items():
        (folder / task).mkdir(parents=True)
        for split in ("train", "validation"):
            Dataset.from_list(rows).to_parquet(folder / task / f"data/{split}-00000-of-00001.parquet")
    configuration = "configs:\n- config_name: winogrande_xl\n  data_files:\n"
    splits = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "validation"))
    (folder / "winogrande/README.md").write_text(f"---\n{configuration}{splits}---\n")
    return folder


@pytest.fixture(scope="module")
def piqa() -> Path:
    if not _PIQA.is_dir():
        pytest.skip(f"no published questions: {_PIQA} is not on this machine")
    return _PIQA


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_database: Path) -> Store:
    """The home of a study with one checkpoint, of the job `fedavg`, and an MLflow store."""
    store = Store(tmp_path_factory.mktemp("home"))
    with made_current(store.checkpoint("fedavg")) as folder:
        create_base_model(PRESETS["tiny"], folder / "model.nemo", 7)
    shutil.copyfile(empty_mlflow_database, store.home / "mlflow.db")
    return store


@pytest.fixture(scope="module")
def checkpoint(home: Store) -> Path:
    return current(home.checkpoint("fedavg")) / "model.nemo"


def _run_by_hand(checkpoint: Path, piqa: Path, folder: Path, *arguments: str) -> tuple[dict[str, Any], list[Any]]:
    """What the harness's own command says of PIQA, and of each question, for the exported checkpoint."""
    import lm_eval

    export_huggingface(checkpoint, folder / "exported")
    with (piqa / "valid.jsonl").open() as questions, (piqa / "valid-labels.lst").open() as labels:
        rows = [{**json.loads(row), "label": int(label)} for row, label in zip(questions, labels, strict=True)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa.yaml").write_text(
        f"include: {Path(lm_eval.__file__).parent}/tasks/piqa/piqa.yaml\n"
        "task: piqa\ndataset_path: json\ntraining_split: null\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {folder}/questions.jsonl\n"
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder}/exported"]
    command += ["--tasks", f"{folder}/piqa.yaml", "--output_path", f"{folder}/out", "--log_samples", *arguments]
    subprocess.run(
        command, check=True, env={**os.environ, "HF_HOME": f"{folder}/hf", "HF_HUB_OFFLINE": "1"}, capture_output=True
    )
    [results] = folder.glob("out/*/results_*.json")
    [samples] = folder.glob("out/*/samples_piqa_*.jsonl")
    by_number = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text()), by_number


def _assert_same(results: Sequence[TaskResult], by_hand: dict[str, Any], samples: list[Any], questions: int) -> None:
    assert [result.metric for result in results] == ["acc", "acc_norm"]
    assert len(samples) == questions
    for result in results:
        assert result.scores == tuple(sample[result.metric] for sample in samples)
        assert result.value == by_hand["results"]["piqa"][f"{result.metric},none"]
        assert result.stderr == by_hand["results"]["piqa"][f"{result.metric}_stderr,none"]
        assert (result.samples, result.questions) == (questions, 1838)
        assert result.harness == f"lm-eval {by_hand['lm_eval_version']}"


@pytest.mark.slow
def test_each_question_is_scored_as_by_the_harness_run_by_hand_on_the_exported_folder(
    checkpoint: Path, piqa: Path, tmp_path: Path
) -> None:
    by_hand, samples = _run_by_hand(checkpoint, piqa, tmp_path, "--batch_size", "16", "--limit", "100")
    results = score_tasks(checkpoint, ["piqa"], piqa, limit=100)
    _assert_same(results, by_hand, samples, 100)
    assert 0 < sum(results[0].scores) < 100


@pytest.mark.long
def test_a_pretrained_model_scores_in_all_of_piqa_what_the_harness_finds_by_hand(piqa: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct. With the full-precision weights of the model before instruction, acc_norm is 0.669."""
    create_base_model(PRESETS["smollm2-135m"], tmp_path / "model.nemo", 1)
    by_hand, samples = _run_by_hand(tmp_path / "model.nemo", piqa, tmp_path, "--batch_size", "16")
    results = score_tasks(tmp_path / "model.nemo", ["piqa"], piqa.parent)
    _assert_same(results, by_hand, samples, 1838)
    assert 0.6 < results[1].value < 0.7


@pytest.mark.slow
def test_files_of_the_authors_and_a_copy_of_the_hub_are_the_same_questions(checkpoint: Path, tmp_path: Path) -> None:
    published = score_tasks(checkpoint, data=_published(tmp_path / "published"))
    copied = score_tasks(checkpoint, data=_copied(tmp_path / "copied"))
    assert [(result.task, result.metric) for result in published] == [
        *(("hellaswag", "acc"), ("hellaswag", "acc_norm")),
        *(("piqa", "acc"), ("piqa", "acc_norm")),
        ("winogrande", "acc"),
    ]
    assert published == copied
    assert all(len(result.scores) == result.samples == result.questions == len(_GOALS) for result in published)
    assert all(result.fewshot == 0 and result.higher_is_better for result in published)


@pytest.fixture
def fedsft(home: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """Run `fedsft tasks` in an empty folder; what it prints, or the message that it ends with."""
    for name in (*home_environment(home.home), "FEDSFT_DATA", "FEDSFT_MODEL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
    monkeypatch.setenv("FEDSFT_HOME", str(home.home))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, fails: bool = False) -> str:
        monkeypatch.setattr("sys.argv", ["fedsft", "tasks", "--checkpoint", "fedavg", *arguments])
        if not fails:
            cli.main()
            return str(capsys.readouterr().out)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return str(end.value.code)

    return run


@pytest.mark.slow
def test_the_command_prints_writes_and_logs_what_a_checkpoint_scores(
    fedsft: Callable[..., str], home: Store, checkpoint: Path, tmp_path: Path
) -> None:
    digest = content_digest(checkpoint)
    tracking = Tracking(home.mlflow_uri, home.mlflow_artifacts)
    client = tracking.client()
    made = client.create_run(tracking.experiment_id(), tags={"checkpoint.digest": digest}, run_name="fedavg")
    other = client.create_run(tracking.experiment_id(), tags={"checkpoint.digest": "0" * 64})
    _published(tmp_path / "data")
    said = fedsft("--tasks", "piqa,winogrande", "--data", "data", "--limit", "3", "--into", "scores")
    report = TaskReport.read(Path("scores"))
    assert report.checkpoint_digest == digest
    assert TaskReport.read(home.tasks(digest)) == report
    assert [(one.task, one.metric, one.samples) for one in report.results] == [
        *(("piqa", "acc", 3), ("piqa", "acc_norm", 3), ("winogrande", "acc", 3)),
    ]
    assert said.splitlines()[0] == "| model   |        piqa acc |   piqa acc_norm |   winogrande acc |"
    assert f"{report.results[0].value:.4f} ± {report.results[0].stderr:.4f}" in said.splitlines()[2]
    assert "piqa 3 of 5 questions, 0-shot (version 1.0, lm-eval " in said
    assert said.splitlines()[-2:] == ["results: scores/tasks.json", f"MLflow: run fedavg, {made.info.run_id}"]
    kept = client.get_run(made.info.run_id).data
    assert kept.metrics == {
        name: value
        for one in report.results
        for name, value in (
            (f"tasks/{one.task}/{one.metric}", one.value),
            (f"tasks/{one.task}/{one.metric}_stderr", one.stderr),
        )
    }
    assert kept.tags["tasks/piqa"].startswith("3 of 5 questions, 0-shot (version 1.0, lm-eval ")
    assert not client.get_run(other.info.run_id).data.metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--tasks piqa --limit 0", "--limit: 0 is too few; the least is 1"),
        ("--tasks , --data data", "--tasks: names no task"),
        ("--tasks pica --data data", r"--tasks: 'pica' is no task of the harness; the harness has .*\bpiqa\b"),
        ("--tasks piqa --data none", "--data: none is not a folder"),
        ("--tasks piqa,arc_easy --data data", "--data: data has no folder 'arc_easy'; with several tasks, each needs"),
        (
            "--tasks ai2_arc --data data",
            r"ai2_arc: is not a task with one dataset; with --data, name single tasks \(arc",
        ),
        ("--tasks arc_easy --data empty", "arc_easy: its questions cannot be loaded from empty: "),
    ],
)
@pytest.mark.slow
def test_what_is_wrong_is_said_in_one_line(
    fedsft: Callable[..., str], tmp_path: Path, arguments: str, words: str
) -> None:
    _published(tmp_path / "data")
    Path("empty").mkdir()
    said = fedsft(*arguments.split(), fails=True)
    assert re.match(words, said), said
    assert "\n" not in said


@pytest.mark.slow
def test_an_answer_that_is_longer_than_the_window_is_no_stack_trace(checkpoint: Path, tmp_path: Path) -> None:
    folder = _published(tmp_path / "data") / "piqa"
    row = {"goal": "Cut bread.", "sol1": "Use a knife. " * 200, "sol2": "Use a sponge."}
    (folder / "valid.jsonl").write_text((json.dumps(row) + "\n") * len(_GOALS))
    with pytest.raises(
        TasksError, match="an answer has more tokens than the model's window of 256, or a question none"
    ):
        score_tasks(checkpoint, ["piqa"], folder)


def test_without_the_harness_the_command_says_how_to_get_it(
    fedsft: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert fedsft(fails=True) == "lm_eval is not installed; pip install 'fedsft-assets[tasks]'"


def _local(data: Path, into: Path, alone: bool = True) -> Path:
    return with_local_questions("piqa", Path("piqa.yaml"), "baber/piqa", data, alone, into)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("valid-labels.lst", None, "valid-labels.lst: is missing; it has the right answer to each line of valid.jsonl"),
        ("valid-labels.lst", "0\n1\n", "valid-labels.lst: has 2 answers to the 5 questions of valid.jsonl"),
        ("valid-labels.lst", "0\n1\n2\n0\n1\n", "valid-labels.lst:3: '2' is not a number from 0 to 1"),
        ("valid.jsonl", "", "valid.jsonl: has no questions"),
        ("valid.jsonl", None, "has no valid.jsonl, and no copy of the repository baber/piqa"),
        ("valid.jsonl", "{\n" * 5, "valid.jsonl:1: is not JSON: "),
        ("valid.jsonl", '{"goal": "a", "sol1": "b"}\n' * 5, "valid.jsonl:1: lacks sol2; "),
        ("valid.jsonl", "[]\n" * 5, "valid.jsonl:1: lacks goal, sol1, sol2; "),
    ],
)
def test_what_is_wrong_with_questions_is_said_with_file_and_line(
    tmp_path: Path, file: str, content: str | None, words: str
) -> None:
    folder = _published(tmp_path / "data") / "piqa"
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(TasksError) as error:
        _local(folder, tmp_path / "into")
    assert words in str(error.value)
    assert str(error.value).startswith(str(folder))


def test_questions_are_taken_as_they_are_with_their_labels(tmp_path: Path) -> None:
    folder = _published(tmp_path / "data") / "piqa"
    odd = {"goal": "Two\u2028lines\x0cand “quotes”", "sol1": "a\n", "sol2": " b"}
    (folder / "valid.jsonl").write_text(json.dumps(odd, ensure_ascii=False) + "\r\n" + "\n")
    (folder / "valid-labels.lst").write_text("1\r\n")
    _local(tmp_path / "data", tmp_path / "into", alone=False)
    [line] = (tmp_path / "into/piqa.jsonl").read_text().splitlines()
    assert json.loads(line) == {**odd, "label": 1}


_RESULT = TaskResult("piqa", "acc_norm", 0.5, 0.25, 4, 4, 0, "1.0", "lm-eval 0.4.13", True, (1.0, 0.0, 1.0, 0.0))


def test_models_stand_side_by_side_if_they_were_asked_the_same() -> None:
    harder = replace(_RESULT, metric="acc", value=0.25, stderr=None)
    table = task_table({"base model": [_RESULT], "fedavg": [replace(_RESULT, value=0.75), harder]})
    assert table.splitlines() == [
        "| model      |   piqa acc_norm |   piqa acc |",
        "|:-----------|----------------:|-----------:|",
        "| base model | 0.5000 ± 0.2500 |            |",
        "| fedavg     | 0.7500 ± 0.2500 |     0.2500 |",
        "",
        "± standard error. piqa 4 questions, 0-shot (version 1.0, lm-eval 0.4.13).",
    ]
    words = r"fedavg: piqa was asked 2 of 4 questions, 0-shot .*, of another model 4 questions, 0-shot"
    with pytest.raises(NotComparableError, match=words):
        task_table({"base model": [_RESULT], "fedavg": [replace(_RESULT, samples=2)]})


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = TaskReport("ab" * 32, (_RESULT, replace(_RESULT, stderr=None, scores=())))
    report.write(tmp_path)
    assert TaskReport.read(tmp_path) == report


def test_results_of_a_task_replace_its_earlier_ones_and_no_others(tmp_path: Path) -> None:
    first, other, again = _RESULT, replace(_RESULT, task="another"), replace(_RESULT, value=0.75)
    TaskReport("ab" * 32, (first, other)).add_to(tmp_path / "tasks")
    TaskReport("ab" * 32, (again,)).add_to(tmp_path / "tasks")
    assert TaskReport.read(tmp_path / "tasks").results == (other, again)


def test_metrics_have_names_that_mlflow_takes_and_new_scores_follow_old_ones(home: Store) -> None:
    tracking = Tracking(home.mlflow_uri, home.mlflow_artifacts)
    client = tracking.client()
    run = client.create_run(tracking.experiment_id()).info.run_id
    log_results([replace(_RESULT, task="gsm8k::x", metric="exact_match,strict-match")], client, run)
    log_results([replace(_RESULT, task="gsm8k::x", metric="exact_match,strict-match", value=1.0)], client, run)
    key = "tasks/gsm8k__x/exact_match/strict-match"
    assert client.get_run(run).data.metrics == {key: 1.0, f"{key}_stderr": 0.25}
    assert [metric.value for metric in client.get_metric_history(run, key)] == [0.5, 1.0]
