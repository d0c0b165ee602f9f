"""Questions of benchmark tasks from a folder of the user's, told to EleutherAI's harness in its own words.

The harness describes a task in a YAML file. A new one that includes it and names another source of questions leaves all
else as it is: prompts, choices, metrics. Nothing is downloaded, and no code from the folder is run.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class TasksError(ValueError):
    """Tasks that cannot be scored: unknown, without questions, or without the harness."""


@dataclass(frozen=True)
class _Published:
    """Validation files as a benchmark's authors publish them: one JSON object a line, of which `fields` are needed.

    `labels` is the file of the right answers, a number below `choices` a line, where the questions lack them.
    """

    questions: str
    fields: tuple[str, ...]
    labels: str | None = None
    choices: int = 0


# https://yonatanbisk.com/piqa, https://github.com/rowanz/hellaswag, https://winogrande.allenai.org
_PUBLISHED = {
    "piqa": _Published("valid.jsonl", ("goal", "sol1", "sol2"), "valid-labels.lst", 2),
    "hellaswag": _Published("hellaswag_val.jsonl", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": _Published("dev.jsonl", ("sentence", "option1", "option2", "answer")),
}

PUBLISHED_TASKS = tuple(sorted(_PUBLISHED))


def with_local_questions(task: str, described: Path, repository: str, data: Path, alone: bool, into: Path) -> Path:
    """Write the harness's file for `task` with questions of the folder `data`; gives its path, in the folder `into`.

    `described` is the file that the harness has for it, and `repository` the dataset on the hub that it would load. The
    questions are in a folder of `data` named like the task or like the dataset, or, if the task is `alone`, in `data`
    itself: in the files that the authors publish (piqa, hellaswag, winogrande), or as a copy of that repository. Raises
    TasksError that says what is missing.
    """
    folder = _folder(task, repository, data, alone)
    into.mkdir(parents=True, exist_ok=True)
    published = _PUBLISHED.get(task)
    told: dict[str, Any] = {
        "include": str(described),
        "task": task,
        "dataset_kwargs": {"cache_dir": str(into / "cache")},
    }
    if published and (folder / published.questions).is_file():
        questions = into / f"{task}.jsonl"
        rows = [json.dumps(row) for row in _rows(published, folder)]
        questions.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        told |= {"dataset_path": "json", "dataset_name": None, "training_split": None}
        told["dataset_kwargs"]["data_files"] = {"validation": str(questions)}
    elif published and not any(folder.rglob("*.parquet")):
        raise TasksError(f"{folder}: has no {published.questions}, and no copy of the repository {repository}")
    else:
        told["dataset_path"] = str(folder.resolve())
    path = into / f"{task}.yaml"
    path.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    return path


def _folder(task: str, repository: str, data: Path, alone: bool) -> Path:
    if not data.is_dir():
        raise TasksError(f"--data: {data} is not a folder")
    for name in (task, repository.rpartition("/")[2]):
        if name and (data / name).is_dir():
            return data / name
    if alone:
        return data
    raise TasksError(f"--data: {data} has no folder {task!r}; with several tasks, each needs one of its name")


def _rows(published: _Published, folder: Path) -> Iterator[Mapping[str, Any]]:
    """The questions, with their right answer as `label` where it comes from another file."""
    path = folder / published.questions
    lines = _lines(path)
    if not lines:
        raise TasksError(f"{path}: has no questions")
    labels = list(_labels(published, folder / published.labels, len(lines))) if published.labels else None
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TasksError(f"{path}:{number + 1}: is not JSON: {error}") from error
        lacking = [field for field in published.fields if not isinstance(row, dict) or field not in row]
        if lacking:
            raise TasksError(f"{path}:{number + 1}: lacks {', '.join(lacking)}; has this been published with answers?")
        fields = {field: row[field] for field in published.fields}
        yield fields if labels is None else {**fields, "label": labels[number]}


def _labels(published: _Published, path: Path, questions: int) -> Iterator[int]:
    if not path.is_file():
        raise TasksError(f"{path}: is missing; it has the right answer to each line of {published.questions}")
    lines = _lines(path)
    if len(lines) != questions:
        raise TasksError(f"{path}: has {len(lines)} answers to the {questions} questions of {published.questions}")
    for number, line in enumerate(lines, 1):
        if line.strip() not in map(str, range(published.choices)):
            raise TasksError(f"{path}:{number}: {line.strip()!r} is not a number from 0 to {published.choices - 1}")
        yield int(line)


def _lines(path: Path) -> list[str]:
    """Lines end with a newline and nothing else: texts may have other characters that Python takes for an end."""
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TasksError(f"{path}: cannot be read: {error}") from error
