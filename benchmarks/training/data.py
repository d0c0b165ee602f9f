"""Makes what all contenders of the training benchmark are given: tokens of the real samples, batches, weights.

One folder holds the same base model twice, as this project's archive and as the Hugging Face folder
that the rivals load, so nobody converts anything while it is measured.
"""

import json
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import PROJECT
from benchmarks.data_files import FOLDERS
from benchmarks.training.parts import Part

SEED = 1234
_GPT2_VOCABULARY = 50_257


@dataclass(frozen=True)
class TrainingInput:
    """Records as token ids, how many of each record's are the prompt's, and each step's records by number."""

    folder: Path
    part: Part
    ids: list[list[int]]
    prompts: list[int]
    batches: list[list[int]]

    @classmethod
    def read(cls, folder: Path) -> "TrainingInput":
        """What `make_input` wrote."""
        content = json.loads((folder / "input.json").read_text(encoding="utf-8"))
        return cls(folder, **{**content, "part": Part(**content["part"])})

    @property
    def archive(self) -> Path:
        return self.folder / "base.nemo"

    @property
    def hugging_face(self) -> Path:
        """A folder of model and tokenizer for `from_pretrained`."""
        return self.folder / "hugging_face"

    @property
    def plan(self) -> Path:
        """What the site of the largest dataset would be told, for its trainer's start."""
        return self.folder / "plan.json"

    @property
    def order(self) -> list[int]:
        """The records of all steps, one after the other."""
        return [index for batch in self.batches for index in batch]

    def rows(self, indices: Iterable[int]) -> list[dict[str, list[int]]]:
        """Records as Hugging Face trainers take them, with labels at the answers only."""
        return [{"input_ids": self.ids[index], "labels": self._labels(index)} for index in indices]

    def _labels(self, index: int) -> list[int]:
        ids, prompt = self.ids[index], self.prompts[index]
        return [-100] * prompt + ids[prompt:]


def make_input(samples: Path, folder: Path, part: Part) -> None:
    """Write the input of a part under `folder`. Raises ValueError if there are too few records for its steps."""
    from fedsft_assets.data.records import read_records
    from fedsft_assets.model.training.batches import tokenize
    from fedsft_assets.store import split_file

    folder.mkdir(parents=True, exist_ok=True)
    splits = make_splits(samples, folder / "splits")
    target = TrainingInput(folder, part, [], [], [])
    model = _make_model(part, target.archive)
    model.lm.save_pretrained(target.hugging_face)
    model.tokenizer.save_pretrained(target.hugging_face)
    records = read_records(split_file(splits["combined"], "training"))
    needed = part.steps * part.batch_size
    if len(records) < needed:
        raise ValueError(f"{samples}: has {len(records)} training records, {part.name} needs {needed}")
    order = list(range(len(records)))
    random.Random(SEED).shuffle(order)
    tokens = tokenize([records[index] for index in order[:needed]], model.tokenizer, part.max_length)
    content = {
        "part": asdict(part),
        "ids": [one.ids for one in tokens],
        "prompts": [one.prompt for one in tokens],
        "batches": [list(range(start, start + part.batch_size)) for start in range(0, needed, part.batch_size)],
    }
    (folder / "input.json").write_text(json.dumps(content), encoding="utf-8")
    if part.model != "gpt2-small":
        _write_plan(part, target, splits)


def make_splits(samples: Path, folder: Path) -> dict[str, Path]:
    from fedsft_assets.data.combine import combine
    from fedsft_assets.data.splits import split_dataset
    from fedsft_assets.specs.dataset import load_datasets

    datasets = load_datasets(PROJECT / "datasets")
    folders = {name: folder / name for name in (*FOLDERS, "combined")}
    for name, source in FOLDERS.items():
        split_dataset(datasets[name], raw=samples / source, into=folders[name])
    combine([folders[name] for name in FOLDERS], into=folders["combined"])
    return folders


def _make_model(part: Part, archive: Path) -> Any:
    from benchmarks.training.ours import preset
    from fedsft_assets.model.base_model import create_base_model
    from fedsft_assets.model.language_model import LanguageModel

    if part.model == "gpt2-small":
        _gpt2_small(part.max_length).save(archive)
    else:
        create_base_model(preset(part), archive, SEED)
    return LanguageModel.load(archive)


def _gpt2_small(max_length: int) -> Any:
    """GPT-2's smallest shape, all its vocabulary, with the tiny preset's tokenizer: ids say nothing about speed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from fedsft_assets.model.language_model import LanguageModel
    from fedsft_assets.model.tokenizer.tiny import EOS, sample_texts, tiny_tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(sample_texts()), eos_token=EOS, bos_token=EOS, pad_token=EOS
    )
    special = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(SEED)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=_GPT2_VOCABULARY, **special, **no_dropout))
    return LanguageModel.wrap(lm, tokenizer, max_length)


def _write_plan(part: Part, target: TrainingInput, splits: dict[str, Path]) -> None:
    from benchmarks.training.ours import site_plan
    from fedsft_assets.files import file_digest
    from fedsft_assets.store import split_file

    training, validation = split_file(splits["alpaca"], "training"), split_file(splits["combined"], "validation")
    digests = {"training_file": file_digest(training), "validation_file": file_digest(validation)}
    plan = site_plan(part, target.archive, training, validation, rounds=1, digests=digests)
    target.plan.write_text(plan.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    make_input(Path(sys.argv[1]), Path(sys.argv[2]), Part(**json.loads(sys.argv[3])))
