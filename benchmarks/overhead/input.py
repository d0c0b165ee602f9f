"""What all contenders of the overhead benchmark are given, as one folder; imports nothing heavy."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

SEED = 1234
# The model: GPT-2's layout, 0.69 M parameters at 256 positions.
VOCABULARY, LAYERS, WIDTH, HEADS = 2048, 2, 128, 4


@dataclass(frozen=True)
class Part:
    """Each site does `steps` optimizer steps of `batch_size` records in each of `rounds` rounds.

    It scores each model that it receives on `evaluation_records` records, and the final one. Records are cut to
    `max_length` tokens. All take the same batches: shuffled ones, as a data loader makes them.
    """

    rounds: int = 3
    steps: int = 30
    batch_size: int = 8
    evaluation_records: int = 64
    max_length: int = 256
    learning_rate: float = 1e-3

    def quick(self) -> Self:
        """The same in a few small steps: shows that all of it runs, not what it costs."""
        return replace(self, rounds=2, steps=2, evaluation_records=8, max_length=64)


@dataclass(frozen=True)
class Rows:
    """Records as token ids, and how many of each record's are the prompt's, which have no loss."""

    ids: list[list[int]]
    prompts: list[int]

    def answers(self, index: int) -> int:
        """How many tokens of a record have a loss."""
        return len(self.ids[index]) - max(self.prompts[index], 1)


@dataclass(frozen=True)
class SiteInput:
    """A site's records, and which of them make up each step of each round.

    `rates[round][step]` are learning rates.
    """

    site: str
    rows: Rows
    batches: list[list[list[int]]]
    rates: list[list[float]]


@dataclass(frozen=True)
class Input:
    """The folder; `write` makes it, all else reads it."""

    folder: Path

    @property
    def hugging_face(self) -> Path:
        """The base model as `from_pretrained` takes it."""
        return self.folder / "hugging_face"

    @property
    def home(self) -> Path:
        """The same work for us: a FEDSFT_HOME with splits, base model and job folder."""
        return self.folder / "home"

    @property
    def part(self) -> Part:
        return Part(**self._read("part"))

    @property
    def sites(self) -> list[str]:
        names: list[str] = self._read("sites")
        return names

    def site(self, name: str) -> SiteInput:
        content = self._read(name)
        return SiteInput(**{**content, "rows": Rows(**content["rows"])})

    def validation(self) -> Rows:
        """The records that every site scores models on."""
        return Rows(**self._read("validation"))

    def write(self, part: Part, sites: list[SiteInput], validation: Rows) -> None:
        self._write("part", asdict(part))
        self._write("sites", [site.site for site in sites])
        self._write("validation", asdict(validation))
        for site in sites:
            self._write(site.site, asdict(site))

    def _read(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def _write(self, name: str, content: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
