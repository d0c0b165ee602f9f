"""Schema of `datasets/<name>.yaml`: where a dataset comes from and how its rows are read."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fedsft_assets.specs.yaml_file import Spec, SpecError, read_yaml, validated, yaml_files

COMBINED = "combined"
SAMPLE = "sample"
HUB = "hub"
DataFormat = Literal["parquet", "jsonl", "csv", "json", "oasst1"]
FORMATS_BY_SUFFIX = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".json": "json"}


class ColumnsSpec(Spec):
    """Column names of the three texts of a row; `context` is optional, in the dataset and in each row."""

    instruction: str
    context: str | None = None
    response: str

    @property
    def names(self) -> list[str]:
        """The columns in use."""
        return [name for name in (self.instruction, self.context, self.response) if name]

    @model_validator(mode="after")
    def _a_column_each(self) -> Self:
        for name in self.names:
            if self.names.count(name) > 1:
                texts = [text for text, column in self.model_dump().items() if column == name]
                raise ValueError(
                    f"{name!r} is used for {' and '.join(texts)}; expected a column for each: split prompt and "
                    "answer into two columns first"
                )
        return self


class ConversationsSpec(Spec):
    """Which replies of OASST1's message trees become records, and their input. The defaults are NVFlare's."""

    languages: Annotated[list[str], Field(description="language codes of replies to include; empty for all")] = ["en"]
    min_review_count: Annotated[int, Field(ge=0, description="minimum review count of the reply and its input")] = 0
    leave_out: Annotated[list[Literal["deleted", "synthetic"]], Field(description="kinds of messages to exclude")] = []
    context: Annotated[
        Literal["prompt", "path"], Field(description="the input: the prompt, or all messages from the first one to it")
    ] = "prompt"


class DatasetSpec(Spec):
    """One dataset: where its files are, and how a row becomes an example.

    `files` are relative to the hub repository, or to `path` where that is a folder. A relative
    `path` starts at the folder of the dataset's YAML file.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    title: str = ""
    license: Annotated[str, Field(description="the license of the data, for whoever uses a model trained on it")] = ""
    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$", description="a dataset repository of the hub")] | None = (
        None
    )
    revision: Annotated[str, Field(description="a commit, branch or tag of that repository")] = "main"
    path: Annotated[Path, Field(description="a file or folder")] | None = None
    files: Annotated[list[str], Field(min_length=1)] | None = None
    use: Annotated[
        Literal["training", "testing"], Field(description="testing: all records are test records, none is trained on")
    ] = "training"
    format: DataFormat
    columns: ColumnsSpec | None = None
    conversations: ConversationsSpec | None = None

    @property
    def label(self) -> str:
        """Display name."""
        return self.title or self.name

    @property
    def folder(self) -> str:
        """This dataset's folder name in a folder of published datasets: the repository's name."""
        return self.hub.split("/")[1] if self.hub else self.name

    @property
    def file_names(self) -> list[str]:
        """The dataset's files, relative to its folder."""
        return self.files or ([self.path.name] if self.path else [])

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check `datasets/<name>.yaml`; the dataset's name is the file's.

        Raises SpecError with one line per invalid field.
        """
        content = read_yaml(path, "'path:' and 'columns:'")
        if "format" not in content and (inferred := _inferred_format(content)):
            content["format"] = inferred
        spec = validated(cls, path, {**content, "name": content.get("name", path.stem)})
        if spec.name != path.stem:
            raise SpecError(f"{path}: name: {spec.name!r} is not the file's name; remove it or write {path.stem!r}")
        if spec.name == COMBINED:
            raise SpecError(f"{path}: {COMBINED!r} is the union of all datasets; give the file another name")
        if spec.path is None:
            return spec
        place = path.parent.resolve() / spec.path.expanduser()
        if place.is_dir() and not spec.files:
            raise SpecError(f"{path}: files: {place} is a folder; name the files in it that make up the dataset")
        return spec.model_copy(update={"path": place})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.hub is None) == (self.path is None):
            raise ValueError("expected either 'path:', a file or folder, or 'hub:', a repository")
        if self.hub and not self.files:
            raise ValueError("files: name the files of the repository that make up the dataset")
        for name in self.files or []:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: {name!r} is outside the dataset's folder")
            if [PurePosixPath(other) for other in self.files or []].count(PurePosixPath(name)) > 1:
                raise ValueError(f"files: {name!r} is listed twice; list each file once")
        if self.format == "oasst1":
            if self.columns:
                raise ValueError("columns: not allowed for the format oasst1; use 'conversations:' to select replies")
        elif self.conversations:
            raise ValueError("conversations: only allowed for the format oasst1")
        elif self.columns is None:
            raise ValueError("columns: name the columns of 'instruction', 'response' and, if any, 'context'")
        return self


def load_datasets(folder: Path) -> dict[str, DatasetSpec]:
    """All datasets of a folder, by name, in the order of their names.

    Raises SpecError if there is none, or for the first invalid file.
    """
    paths = yaml_files(folder)
    if not paths:
        raise SpecError(f"{folder}: has no dataset files; write one as <dataset>.yaml")
    return {path.stem: DatasetSpec.load(path) for path in paths}


def _inferred_format(content: dict[str, Any]) -> str | None:
    """The format according to the suffixes of a dataset's files, or None."""
    names = content.get("files") or [content.get("path")]
    suffixes = {PurePosixPath(str(name)).suffix.lower() for name in names} if isinstance(names, list) else set()
    return FORMATS_BY_SUFFIX.get(suffixes.pop()) if len(suffixes) == 1 else None
