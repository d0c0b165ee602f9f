"""What a user would train with instead: a plain padded loop, the Hugging Face Trainer, TRL's SFTTrainer.

Each takes the same records and starts from the same weights; batch size, learning rate and fp32 are
set for all, everything else stays at its defaults.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.training.data import TrainingInput
from benchmarks.training.watch import Watch

Rival = Callable[[TrainingInput, Watch], float]
Rows = Sequence[dict[str, list[int]]]


def plain(given: TrainingInput, watch: Watch) -> float:
    """The loop of a tutorial: batches padded to their longest record, the model's own loss, AdamW."""
    model, collate = _model(given), DataCollatorForSeq2Seq(_tokenizer(given))
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.part.learning_rate, weight_decay=0.0)
    model.train()
    for indices in given.batches:
        batch = collate(given.rows(indices))
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss.item(), int(batch["attention_mask"].sum()))
    return watch.losses[0]


def trainer(given: TrainingInput, watch: Watch) -> float:
    """The Trainer at its defaults, fed in the order that all share."""
    _train(_trainer(given, watch, train_sampling_strategy="sequential"))
    return watch.losses[0]


def trainer_grouped(given: TrainingInput, watch: Watch) -> float:
    """The Trainer, which puts records of similar lengths together."""
    made = _trainer(given, watch, train_sampling_strategy="group_by_length")
    _train(made)
    return _first_loss(made, given, given.rows(given.batches[0]))


def trl(given: TrainingInput, watch: Watch) -> float:
    """The SFTTrainer at its defaults, gradient checkpointing among them, fed in the order that all share."""
    _train(_sft_trainer(given, watch, given.part.batch_size, train_sampling_strategy="sequential"))
    return watch.losses[0]


def trl_packing(given: TrainingInput, watch: Watch) -> float:
    """The SFTTrainer with packing: about as many records in a step as the others have."""
    from trl import pack_dataset

    length = given.part.max_length
    packed = len(pack_dataset(_dataset(given.rows(given.order)), length))
    rows = max(1, round(packed / given.part.steps))
    made = _sft_trainer(given, watch, rows, packing=True)
    _train(made)
    return _first_loss(made, given, list(pack_dataset(_dataset(given.rows(given.batches[0])), length)))


RIVALS: dict[str, Rival] = {
    "plain": plain,
    "trainer": trainer,
    "trainer-grouped": trainer_grouped,
    "trl": trl,
    "trl-packing": trl_packing,
}


def _trainer(given: TrainingInput, watch: Watch, **arguments: Any) -> Trainer:
    tokenizer = _tokenizer(given)
    made = Trainer(
        model=_model(given),
        args=TrainingArguments(**_arguments(given, given.part.batch_size), **arguments),
        train_dataset=_dataset(given.rows(given.order)),
        processing_class=tokenizer,
        # The default for a tokenizer pads no labels.
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return _watched(made, watch)


def _sft_trainer(given: TrainingInput, watch: Watch, batch_size: int, **arguments: Any) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    made = SFTTrainer(
        model=_model(given),
        # It would compute in bf16, which this comparison does not.
        args=SFTConfig(**_arguments(given, batch_size), max_length=given.part.max_length, bf16=False, **arguments),
        train_dataset=_dataset(given.rows(given.order)),
        processing_class=_tokenizer(given),
    )
    return _watched(made, watch)


def _arguments(given: TrainingInput, batch_size: int) -> dict[str, Any]:
    """What all contenders are given, and one loss for each step to compare them by."""
    return {
        "output_dir": str(given.folder / "trainer"),
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "learning_rate": given.part.learning_rate,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def _watched(made: Trainer, watch: Watch) -> Trainer:
    counted = _Counted(made.data_collator)
    made.data_collator = counted
    made.remove_callback(PrinterCallback)
    made.add_callback(_Steps(watch, counted))
    return made


def _train(made: Trainer) -> None:
    made.train()


def _first_loss(made: Trainer, given: TrainingInput, rows: Rows) -> float:
    """The loss of rows through the trainer's own loss, at the weights that it started from."""
    made.model.load_state_dict(_model(given).state_dict())
    batch = made.data_collator(rows)
    answers = (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        return made.compute_loss(made.model, batch, num_items_in_batch=answers).item()


class _Counted:
    """A collator, and how many real tokens each batch that it made has."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.tokens: list[int] = []

    def __call__(self, rows: Rows) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.collate(rows)


class _Steps(TrainerCallback):
    """Hands each step's loss on. Batches are made ahead of their steps, so they are counted by number."""

    def __init__(self, watch: Watch, counted: _Counted) -> None:
        self.watch, self.counted = watch, counted

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.watch.step(logs["loss"], self.counted.tokens[len(self.watch.losses)])


def _model(given: TrainingInput) -> Any:
    return AutoModelForCausalLM.from_pretrained(given.hugging_face, dtype=torch.float32)


def _tokenizer(given: TrainingInput) -> Any:
    return AutoTokenizer.from_pretrained(given.hugging_face)


def _dataset(rows: Rows) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(rows))
