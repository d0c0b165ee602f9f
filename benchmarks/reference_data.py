"""The published NVFlare example's data preparation, retold: what `benchmarks.data` compares this project with.

Each command is one of its scripts and does the same work per row and per file: `iterrows`, an unseeded
coin for the order of instruction and context, a fixed shuffle, `json.dumps` line by line, and a combine
that holds a whole split in memory. Its faults are kept: the first tenth is called testing, not validation.
See https://github.com/NVIDIA/NVFlare/tree/main/integration/nemo/examples/supervised_fine_tuning/utils
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd


def main() -> None:
    """Preprocess one dataset, or combine one split of several."""
    args = _arguments()
    if args.command == "combine":
        combine(args.file_list, args.output_path)
        return
    read, prompt, output = _DATASETS[args.command]
    rows = read(args.training_file)
    if args.validation_file:
        rows = pd.concat([rows, read(args.validation_file)])
    rows = rows.sample(frac=1, random_state=0).reset_index(drop=True)
    write_splits(rows, prompt, output, args.output_dir, args.validation_ratio, args.testing_ratio)


def read_parquet(path: str) -> pd.DataFrame:
    """The whole table, with all its columns."""
    # Only two of the published scripts import it, and its start-up is part of what is measured.
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pandas()


def read_jsonl(path: str) -> pd.DataFrame:
    """The whole file as a table."""
    return pd.read_json(path, lines=True)


def read_oasst1(path: str) -> pd.DataFrame:
    """The best English replies, each with the text of the message that it answers."""
    messages = read_parquet(path)
    replies = messages[(messages.role == "assistant") & (messages["rank"] == 0.0)].copy()
    prompts = messages[messages.role == "prompter"].copy().set_index("message_id")
    replies["output"] = replies["text"].values
    texts, parents = [], []
    for _, reply in replies.iterrows():
        prompt = prompts.loc[reply.parent_id]
        texts.append(prompt.text)
        parents.append(prompt.parent_id)
    replies["instruction"] = texts
    replies["parent_id"] = parents
    replies = replies[replies.lang == "en"]
    return replies[["instruction", "output"]]


def write_splits(
    rows: pd.DataFrame, prompt: Callable[[pd.Series], str], output: str, folder: str, validation: float, testing: float
) -> None:
    """Write the rows to three files by their place in the shuffled table."""
    first = int(len(rows) * validation)
    second = first + int(len(rows) * testing)
    target = Path(folder)
    with (
        (target / "validation.jsonl").open("w") as validation_file,
        (target / "testing.jsonl").open("w") as testing_file,
        (target / "training.jsonl").open("w") as training_file,
    ):
        for place, (_, item) in enumerate(rows.iterrows()):
            file = testing_file if place < first else validation_file if place < second else training_file
            file.write(json.dumps({"input": prompt(item), "output": item[output]}) + "\n")


def instruction_with(context_column: str) -> Callable[[pd.Series], str]:
    """How a row's instruction and context become one input."""

    def prompt(item: pd.Series) -> str:
        context = item[context_column].strip()
        if context == "":
            return item["instruction"]
        context_first = np.random.randint(0, 2) == 0
        instruction = item["instruction"].strip()
        assert instruction != ""
        return f"{context}\n\n{instruction}" if context_first else f"{instruction}\n\n{context}"

    return prompt


def instruction_alone(item: pd.Series) -> str:
    """The input of a row without a context column."""
    return item["instruction"]


def combine(paths: list[str], output: str) -> None:
    """Write all files' records to one, shuffled."""
    combined = pd.DataFrame()
    for path in paths:
        combined = pd.concat([combined, pd.read_json(path, lines=True)])
    combined = combined.sample(frac=1, random_state=0).reset_index(drop=True)
    with Path(output).open("w") as file:
        file.write(combined.to_json(orient="records", lines=True))


_DATASETS: dict[str, tuple[Callable[[str], pd.DataFrame], Callable[[pd.Series], str], str]] = {
    "alpaca": (read_parquet, instruction_with("input"), "output"),
    "dolly": (read_jsonl, instruction_with("context"), "response"),
    "oasst1": (read_oasst1, instruction_alone, "output"),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in _DATASETS:
        command = commands.add_parser(name)
        command.add_argument("--training_file", required=True)
        command.add_argument("--validation_file")
        command.add_argument("--validation_ratio", type=float, default=0.1)
        command.add_argument("--testing_ratio", type=float, default=0.1)
        command.add_argument("--output_dir", required=True)
    command = commands.add_parser("combine")
    command.add_argument("--file_list", nargs="+", required=True)
    command.add_argument("--output_path", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
