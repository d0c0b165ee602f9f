"""This project's training as the benchmark calls it: the model, a site's plan, one round over given batches."""

from pathlib import Path
from typing import Any

from benchmarks.training.data import SEED, TrainingInput
from benchmarks.training.parts import Part
from benchmarks.training.watch import Watch
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.local_training import train_round
from fedsft_assets.specs.job import TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS, ModelPreset
from fedsft_assets.specs.plan import SitePlan

# The learning rate falls over all rounds of a job; in a job this long it is as good as constant in the first.
_ROUNDS = 10**6


def ours(given: TrainingInput, watch: Watch) -> float:
    """Train as a site does in a round; the loss of the first batch."""
    tokens = [Tokens(ids, prompt) for ids, prompt in zip(given.ids, given.prompts, strict=True)]
    sizes = iter([sum(len(tokens[index]) for index in batch) for batch in given.batches])
    model = LanguageModel.load(given.archive)
    plan = site_plan(given.part, given.archive, Path("training.jsonl"), Path("validation.jsonl"), rounds=_ROUNDS)
    train_round(
        model, tokens, plan, 0, on_step=lambda point: watch.step(point.loss, next(sizes)), batches=given.batches
    )
    return watch.losses[0]


def preset(part: Part) -> ModelPreset:
    """The part's model as a user names it; GPT-2's smallest shape is treated as a folder of a user's would be."""
    if part.model in PRESETS:
        return PRESETS[part.model]
    return ModelPreset(
        part.model, part.name, part.learning_rate, part.batch_size, part.max_length, micro_batch_tokens=4096
    )


def site_plan(
    part: Part, archive: Path, training_file: Path, validation_file: Path, rounds: int, **changes: Any
) -> SitePlan:
    """A site's plan with the part's figures, and with neither warm-up nor decay: the rivals have none."""
    return SitePlan(
        job="benchmark",
        site="site-1",
        rounds=rounds,
        local_epochs=1,
        max_local_steps=part.steps,
        max_evaluation_records=None,
        seed=SEED,
        training=preset(part).resolve(
            TrainingSpec(
                batch_size=part.batch_size,
                learning_rate=part.learning_rate,
                max_length=part.max_length,
                warmup_ratio=0.0,
                weight_decay=0.0,
                gradient_clip=1.0,
                precision="32",
            )
        ),
        base_model=archive,
        training_file=training_file,
        validation_file=validation_file,
        **{"digests": {}, **changes},
    )
