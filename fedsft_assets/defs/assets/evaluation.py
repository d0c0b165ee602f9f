"""`evaluation/<job>` and `evaluation/base_model`: the loss of a model on each record of the testing splits.

With its answers to a sample of these records.
"""

from pathlib import Path
from typing import NamedTuple

import dagster as dg

from fedsft_assets.data.records import DataError
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.resources import ModelResource, StoreResource
from fedsft_assets.evaluation.matrix import loss_matrix
from fedsft_assets.evaluation.record_scores import LOSSES_FILE, Evaluation, evaluate
from fedsft_assets.evaluation.sample_answers import answer_sample, sample, write_answers
from fedsft_assets.execution import CheckpointInputs
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.files import file_digest
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.errors import ModelError
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import BASE_MODEL, JobSpec, TrainingSpec
from fedsft_assets.specs.plan import ResolvedTraining
from fedsft_assets.store import Store, archive_file
from fedsft_assets.versions import adding


def evaluation_asset(spec: JobSpec, seeds: dg.PartitionsDefinition | None = None) -> dg.AssetsDefinition:
    @dg.asset(
        key_prefix="evaluation",
        name=spec.name,
        group_name="evaluations",
        kinds={"parquet", "pytorch"},
        partitions_def=seeds,
        ins={"checkpoint": dg.AssetIn(["checkpoint", spec.name]), COMBINED: dg.AssetIn(COMBINED)},
        description=f"{spec.description}: the loss of its checkpoint on each record of the testing splits.",
    )
    def evaluation(
        context: dg.AssetExecutionContext, store: StoreResource, model: ModelResource, checkpoint: Path, combined: Path
    ) -> dg.MaterializeResult[Path]:
        files = store.of_run(context.run)
        plan = JobFolder.read(files.home / CheckpointInputs.read(checkpoint).job_folder).plans[0]
        # Batches and precision are the job's own; what is scored is the same for all models.
        alike = model.load().resolve(TrainingSpec()).model_dump(include={"max_length", "answer_only_loss"})
        training, most = plan.training.model_copy(update=alike), plan.max_evaluation_records
        digest = JobReport.read(checkpoint).checkpoint_digest
        scored = _Scored(spec.name, checkpoint / MODEL_FILE, digest, plan.seed)
        return _evaluated(scored, files, combined, training, most)

    return evaluation


def base_model_evaluation_asset(seeds: dg.PartitionsDefinition | None = None) -> dg.AssetsDefinition:
    @dg.asset(
        key_prefix="evaluation",
        name=BASE_MODEL,
        group_name="evaluations",
        kinds={"parquet", "pytorch"},
        partitions_def=seeds,
        ins={"archive": dg.AssetIn("base_model"), COMBINED: dg.AssetIn(COMBINED)},
        description="The loss of the base model on each record of the testing splits.",
    )
    def base_model_evaluation(
        context: dg.AssetExecutionContext, store: StoreResource, model: ModelResource, archive: Path, combined: Path
    ) -> dg.MaterializeResult[Path]:
        training, path = model.load().resolve(TrainingSpec()), archive_file(archive)
        seed = int(context.partition_key) if context.has_partition_key else None
        scored = _Scored(BASE_MODEL, path, content_digest(path), seed)
        return _evaluated(scored, store.of_run(context.run), combined, training, None)

    return base_model_evaluation


class _Scored(NamedTuple):
    """A model to be scored: its job, archive and content digest, and the seed that it was made with, if any."""

    name: str
    archive: Path
    digest: str
    seed: int | None


def _evaluated(
    model: _Scored, store: Store, combined: Path, training: ResolvedTraining, most: int | None
) -> dg.MaterializeResult[Path]:
    """A version of the evaluation of this model."""
    from fedsft_assets.model.language_model import LanguageModel

    with as_dagster_failure(ModelError, DataError):
        loaded = LanguageModel.load(model.archive)
        losses = evaluate(loaded, store, combined, training, most)
        answers = answer_sample(loaded, sample(combined))
    split = SplitReport.read(combined).digest
    with adding(store.evaluation(model.name)) as addition:
        losses.to_parquet(addition.folder / LOSSES_FILE, index=False)
        Evaluation(model.name, model.digest, split, training.max_length, model.seed).write(addition.folder)
        write_answers(answers, addition.folder)
    path = addition.version / LOSSES_FILE
    (row,) = loss_matrix(losses.assign(model=model.name, seed=model.seed)).to_dict("records")
    return dg.MaterializeResult(
        value=addition.version,
        data_version=dg.DataVersion(file_digest(path)),
        metadata={
            **{f"loss on {dataset}": round(loss, 4) for dataset, loss in row.items()},
            "records": int(losses["first"].sum()),
            "answer tokens": int(losses.loc[losses["first"], "tokens"].sum()),
            "path": dg.MetadataValue.path(path),
        },
    )
