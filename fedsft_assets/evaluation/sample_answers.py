"""A model's answers to a fixed sample of the testing split, and how near they come to the answers in the data.

The sample is the same for all models of a study, and for all studies of the same data: the records with the smallest
digests.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedsft_assets.data.hashing import byte_hashes
from fedsft_assets.data.records import Record
from fedsft_assets.evaluation.markdown import markdown_table
from fedsft_assets.evaluation.record_scores import Evaluation, split_lines
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.store import split_file

if TYPE_CHECKING:
    from fedsft_assets.model.language_model import LanguageModel

SAMPLE_FILE = "answers.json"
SAMPLE_RECORDS = 20
SAMPLE_SETTINGS = GenerationSettings(max_new_tokens=48)

_WORDS = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class SampleAnswer:
    """An answer to the `prompt` of one record, by its digest as in `record_scores`; `reference` is the record's own."""

    record: str
    prompt: str
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        """Whether it is the reference but for white space at the ends."""
        return self.answer.strip() == self.reference.strip()

    @cached_property
    def rouge_l(self) -> float:
        """The F-measure of ROUGE-L, 0 to 1: the longest common subsequence of its and the reference's words."""
        return rouge_l(self.reference, self.answer)


class AnswerScores(NamedTuple):
    """Means over the sample, each 0 to 1."""

    exact: float
    rouge_l: float

    @classmethod
    def of(cls, answers: Sequence[SampleAnswer]) -> AnswerScores:
        count = len(answers)
        return cls(sum(one.exact for one in answers) / count, sum(one.rouge_l for one in answers) / count)


def sample(combined: Path, records: int = SAMPLE_RECORDS) -> dict[str, Record]:
    """The sample of a version of the combined splits: records of its testing split by their digests.

    Raises DataError if the split cannot be read.
    """
    lines = split_lines(split_file(combined, "testing"))
    by_digest = {f"{digest:016x}": line for digest, line in zip(byte_hashes(lines).tolist(), lines, strict=True)}
    return {digest: json.loads(by_digest[digest]) for digest in heapq.nsmallest(records, by_digest)}


def answer_sample(model: LanguageModel, asked: Mapping[str, Record]) -> list[SampleAnswer]:
    """Generate the model's answers, each by the likeliest tokens."""
    prompts = [record["input"] for record in asked.values()]
    answers = model.generate(prompts, SAMPLE_SETTINGS, batch_size=SAMPLE_RECORDS)
    return [
        SampleAnswer(digest, record["input"], record["output"], answer)
        for (digest, record), answer in zip(asked.items(), answers, strict=True)
    ]


def rouge_l(reference: str, answer: str) -> float:
    """The F-measure of ROUGE-L by the package rouge_score, without stemming.

    Words are those of its own tokenizer where a text is in English; it has none for letters other than a to z.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return float(scorer.score(reference, answer)["rougeL"].fmeasure)


class _Words:
    """The tokenizer that rouge_score is given."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


def write_answers(answers: Sequence[SampleAnswer], folder: Path) -> None:
    """Write them into a version of an evaluation."""
    content = json.dumps([asdict(one) for one in answers], ensure_ascii=False, indent=1)
    (folder / SAMPLE_FILE).write_text(content + "\n", encoding="utf-8")


def read_answers(evaluations: Sequence[Path]) -> dict[str, list[SampleAnswer]]:
    """The answers in versions of evaluations, by model; without those of an earlier version, which have none."""
    return {
        Evaluation.read(folder).model: [SampleAnswer(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
        for folder in evaluations
        if (file := folder / SAMPLE_FILE).exists()
    }


def scores_table(models: Mapping[str, Sequence[SampleAnswer]]) -> str:
    """The scores of models, by their names, as Markdown."""
    scores = {name: AnswerScores.of(answers) for name, answers in models.items()}
    rows = [(name, f"{found.exact:.2f}", f"{found.rouge_l:.3f}") for name, found in scores.items()]
    table = markdown_table((f"answers to {_records(models)} test records", "exact match", "ROUGE-L"), rows, texts=1)
    return f"{table}\n\nMeans, 1 at best. {how()}."


def how() -> str:
    """How the answers were made."""
    return f"Answers take the likeliest tokens, at most {SAMPLE_SETTINGS.max_new_tokens} of them"


def _records(models: Mapping[str, Sequence[SampleAnswer]]) -> int:
    return max(map(len, models.values()))
