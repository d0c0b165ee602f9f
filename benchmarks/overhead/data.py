"""Makes what all contenders of the overhead benchmark are given: records and their batches, and one base model twice.

Our side gets a FEDSFT_HOME as the data assets leave it, tokens included; the others get the same records as tokens.
"""

import json
import math
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.data import PROJECT
from benchmarks.data_files import FOLDERS
from benchmarks.overhead.input import HEADS, LAYERS, SEED, VOCABULARY, WIDTH, Input, Part, Rows, SiteInput
from benchmarks.training.data import make_splits
from fedsft_assets.data.records import Record, dump_records, read_records
from fedsft_assets.federation.job_folder import JobFolder, build_job_folder
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE, template
from fedsft_assets.model.tokenizer.tiny import EOS
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.local_training import round_batches, split_tokens
from fedsft_assets.model.training.optimizer import Schedule
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.specs.model_preset import ModelPreset
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import add_version, adding, current, make_current

JOB = "fedavg"


def make_input(samples: Path, given: Input, part: Part) -> None:
    """Write the input with the three sites of the published study."""
    spec = JobSpec.load(PROJECT / "jobs" / f"{JOB}.yaml", list(FOLDERS))
    store = Store(given.home)
    records = _splits(samples, given, store)
    for site in spec.sites.values():  # whole batches alone, so that a step is as many records for each site
        _put_records(store, site.dataset, _whole_batches(records[site.dataset], part))
    write_input(given, part, spec, records[COMBINED])


def make_many(samples: Path, given: Input, part: Part, sites: int) -> None:
    """Write an input with so many sites. Each has just the records of a round; real ones, used again when they end."""
    store = Store(given.home)
    records = _splits(samples, given, store)[COMBINED]
    endless, names = cycle(records), [f"site_{number}" for number in range(1, sites + 1)]
    for name in names:
        _put_records(store, name, list(islice(endless, part.steps * part.batch_size)))
    spec = JobSpec.load(PROJECT / "jobs" / f"{JOB}.yaml", list(FOLDERS))
    of_each = {name.replace("_", "-"): SiteSpec(dataset=name) for name in names}
    write_input(given, part, spec.model_copy(update={"sites": of_each}), records)


def write_input(given: Input, part: Part, spec: JobSpec, texts: Sequence[Record]) -> None:
    """Write what follows from the splits in the store: base model, job folder, tokens and batches."""
    store = Store(given.home)
    preset = ModelPreset(
        name="overhead",
        title="GPT-2 layout, 2 layers of width 128",
        learning_rate=part.learning_rate,
        batch_size=part.batch_size,
        max_length=part.max_length,
    )
    model = _make_model(given, part, texts)
    with adding(store.base_model(preset.name)) as addition:
        model.save(addition.folder / f"{preset.name}.nemo")
    make_current(addition.version)
    job_folder = build_job_folder(_job(spec, store, part), preset, store).folder
    plans = JobFolder.read(job_folder).located_plans
    validation = _rows(_tokens(model, plans[0].validation_file, part)[: part.evaluation_records])
    _tokens(model, split_file(current(store.combined), "testing"), part)
    given.write(part, [_site(model, plan, part) for plan in plans], validation)


def _splits(samples: Path, given: Input, store: Store) -> dict[str, list[Record]]:
    """Put the samples' splits into the store; their training records."""
    for name, folder in make_splits(samples, given.folder / "splits").items():
        make_current(add_version(store.splits(name), folder))
    return {name: read_records(split_file(current(store.splits(name)), "training")) for name in (*FOLDERS, COMBINED)}


def _whole_batches(records: Sequence[Record], part: Part) -> list[Record]:
    """As many of the records as whole batches take."""
    return list(records[: len(records) - len(records) % part.batch_size])


def _put_records(store: Store, dataset: str, records: list[Record]) -> None:
    """Make these records the dataset's training split."""
    with adding(store.splits(dataset)) as addition:
        split_file(addition.folder, "training").write_bytes(dump_records(records))
    make_current(addition.version)


def _job(spec: JobSpec, store: Store, part: Part) -> JobSpec:
    """The job with the part's figures, and an optimizer that starts anew each round, as a tutorial's does."""
    fewest = min(len(read_records(split_file(current(store.splits(name)), "training"))) for name in spec.datasets)
    return spec.override(
        rounds=part.rounds,
        local_epochs=math.ceil(part.steps * part.batch_size / fewest),
        max_local_steps=part.steps,
        max_evaluation_records=part.evaluation_records,
        warmup_ratio=0.0,
        weight_decay=0.0,
        optimizer_state="reset",
        precision="32",
    )


def _make_model(given: Input, part: Part, texts: Sequence[Record]) -> LanguageModel:
    """The model as a Hugging Face folder, and as ours."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _tokenizer(texts)
    special = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        n_positions=part.max_length,
        **special,
        **no_dropout,
    )
    torch.manual_seed(SEED)
    lm = GPT2LMHeadModel(config)
    lm.save_pretrained(given.hugging_face)
    return LanguageModel.wrap(lm, tokenizer, part.max_length)


def _tokenizer(records: Sequence[Record]) -> Any:
    """A byte-level BPE of the training records."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    style = template(DEFAULT_TEMPLATE)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [style.prompt(one["input"]) + style.answer(one["output"]) for one in records],
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS, bos_token=EOS, pad_token=EOS)


def _site(model: LanguageModel, plan: SitePlan, part: Part) -> SiteInput:
    tokens = _tokens(model, plan.training_file, part)
    batches = [round_batches(tokens, plan, round, model.answer_loss.packs) for round in range(part.rounds)]
    schedule = Schedule(part.learning_rate, part.rounds * part.steps)
    rates = [[schedule.at(round * part.steps + step) for step in range(part.steps)] for round in range(part.rounds)]
    return SiteInput(plan.site, _rows(tokens), batches, rates)


def _tokens(model: LanguageModel, split: Path, part: Part) -> list[Tokens]:
    """A split's tokens, which are then kept beside it, as the data assets leave them."""
    return split_tokens(model, split, part.max_length)


def _rows(tokens: Sequence[Tokens]) -> Rows:
    return Rows([one.ids for one in tokens], [one.prompt for one in tokens])


if __name__ == "__main__":
    given, part = Input(Path(sys.argv[2])), Part(**json.loads(sys.argv[3]))
    given.folder.mkdir(parents=True)
    if len(sys.argv) > 4:
        make_many(Path(sys.argv[1]), given, part, int(sys.argv[4]))
    else:
        make_input(Path(sys.argv[1]), given, part)
