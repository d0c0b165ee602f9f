"""`inference`: the answers of the base model and every checkpoint to the same prompts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import dagster as dg
from pydantic import Field

from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.resources import StoreResource
from fedsft_assets.defs.seeds import by_seed
from fedsft_assets.evaluation.answers import ANSWERS_FILE, answer
from fedsft_assets.evaluation.comparison import sort_key
from fedsft_assets.evaluation.prompts import ExamplePrompt, parse_prompts
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.files import file_digest
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.store import archive_file
from fedsft_assets.versions import adding


class PromptConfig(dg.Config):
    """A question, with an optional context."""

    question: str
    context: str = ""


class GenerationConfig(dg.Config):
    """How answers are generated: greedy at temperature 0, otherwise sampled with the seed."""

    max_new_tokens: int = 48
    temperature: float = 0.0
    seed: int = 1234


def inference_asset(jobs: Sequence[JobSpec], examples: Sequence[ExamplePrompt]) -> dg.AssetsDefinition:
    class InferenceConfig(GenerationConfig):
        """Generation settings and prompts; the default prompts are those of the prompts file."""

        # Dagster requires plain values as the default of a list.
        prompts: list[PromptConfig] = Field([example.model_dump() for example in examples], validate_default=True)

    @dg.asset(
        group_name="comparison",
        kinds={"markdown", "pytorch"},
        ins={
            "base_model": dg.AssetIn("base_model"),
            **{f"checkpoint_{job.name}": dg.AssetIn(["checkpoint", job.name]) for job in jobs},
        },
        description="The answers of the base model and of every checkpoint, of the first seed, to the same prompts.",
    )
    def inference(
        config: InferenceConfig, store: StoreResource, **versions: Path | dict[str, Path]
    ) -> dg.MaterializeResult[Path]:
        ordered = sorted(jobs, key=lambda job: sort_key(job.kind, job.name))
        checkpoints = {job.name: by_seed(versions[f"checkpoint_{job.name}"])[0] for job in ordered}
        archives = {
            "base model": archive_file(by_seed(versions["base_model"])[0]),
            **{job: folder / MODEL_FILE for job, folder in checkpoints.items()},
        }
        with as_dagster_failure(ModelError, SpecError):
            prompts = parse_prompts(Path("launchpad"), config.model_dump(include={"prompts"}))
            settings = GenerationSettings(config.max_new_tokens, config.temperature, seed=config.seed)
            answers = answer(archives, prompts, settings)
        names = {job: checkpoint.name for job, checkpoint in checkpoints.items()}
        with adding(store.files.report("inference")) as addition:
            answers.write(addition.folder / "inference.md")
            replace(answers, versions=names).write_json(addition.folder / ANSWERS_FILE)
        table = addition.version / "inference.md"
        return dg.MaterializeResult(
            value=addition.version,
            data_version=dg.DataVersion(file_digest(table)),
            metadata={
                "answers": dg.MetadataValue.md(answers.markdown()),
                "prompts": len(answers.prompts),
                "models": len(answers.models),
                "path": dg.MetadataValue.path(table),
            },
        )

    return inference
