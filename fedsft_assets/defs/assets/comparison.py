"""`comparison`: tables, a plot and a report over all jobs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg

from fedsft_assets.champion import move_champion
from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.metadata import image, run_tags
from fedsft_assets.defs.resources import MLflowResource, ModelResource, SourceResource, StoreResource
from fedsft_assets.defs.seeds import by_seed
from fedsft_assets.evaluation.comparison import NotComparableError, compare
from fedsft_assets.evaluation.curves import plot
from fedsft_assets.evaluation.record_scores import Evaluation
from fedsft_assets.evaluation.report.page import write_report
from fedsft_assets.evaluation.report.study import Study, kept_answers, kept_tasks
from fedsft_assets.evaluation.report.study_facts import BaseModelFacts, dataset_facts
from fedsft_assets.evaluation.sample_answers import read_answers
from fedsft_assets.evaluation.statistics.prompt_losses import ScoresError
from fedsft_assets.execution import CheckpointInputs
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.files import file_digest
from fedsft_assets.specs.dataset import COMBINED, DatasetSpec
from fedsft_assets.specs.job import BASE_MODEL, JobSpec
from fedsft_assets.specs.model_preset import ModelPreset
from fedsft_assets.store import Store
from fedsft_assets.study_run import record_study
from fedsft_assets.versions import adding


def comparison_asset(jobs: Sequence[JobSpec], datasets: Sequence[DatasetSpec]) -> dg.AssetsDefinition:
    names = [job.name for job in jobs]

    @dg.asset(
        group_name="comparison",
        kinds={"markdown", "matplotlib"},
        ins={
            f"{kind}_{name}": dg.AssetIn([kind, name])
            for kind, models in (("checkpoint", names), ("evaluation", [BASE_MODEL, *names]))
            for name in models
        },
        deps=["inference"],  # its answers are shown if there are any; without them there is a report all the same
        description="All jobs and the base model side by side: which to use and why, losses, intervals and verdicts.",
    )
    def comparison(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        source: SourceResource,
        model: ModelResource,
        mlflow: MLflowResource,
        **versions: Path | dict[str, Path],
    ) -> dg.MaterializeResult[Path]:
        files, preset = store.files, model.load()
        checkpoints = {name: by_seed(versions[f"checkpoint_{name}"]) for name in names}
        evaluations = [by_seed(versions[f"evaluation_{name}"]) for name in (BASE_MODEL, *names)]
        with as_dagster_failure(NotComparableError, ScoresError):
            study = _study(files, checkpoints, evaluations, datasets, source.data, preset)
            champion = move_champion([seeds[0] for seeds in evaluations], files, preset, mlflow.tracking)
        with adding(files.report("comparison")) as addition:
            study.write_markdown(addition.folder / "comparison.md")
            plot([one for seeds in study.comparison.runs.values() for one in seeds], addition.folder / "comparison.png")
            write_report(study, addition.folder / "report.html")
        table, chart, report = (addition.version / name for name in ("comparison.md", "comparison.png", "report.html"))
        record_study(study, addition.version, run_tags(context), files, mlflow.tracking)
        result = study.comparison
        return dg.MaterializeResult(
            value=addition.version,
            data_version=dg.DataVersion(file_digest(table)),
            metadata={
                "report": dg.MetadataValue.path(report),
                "table": dg.MetadataValue.md(study.markdown()),
                "validation loss": image(chart),
                "champion": dg.MetadataValue.md(champion.markdown()),
                **{f"{one.job}: best validation loss": round(one.best_val_loss, 4) for one in result.reports},
                "base model's test loss": round(float(result.matrix[COMBINED].loc[BASE_MODEL]), 4),
                "table file": dg.MetadataValue.path(table),
                "plot file": dg.MetadataValue.path(chart),
            },
        )

    return comparison


def _study(
    store: Store,
    checkpoints: Mapping[str, Sequence[Path]],
    evaluations: Sequence[Sequence[Path]],
    datasets: Sequence[DatasetSpec],
    data: str,
    preset: ModelPreset,
) -> Study:
    """All that these versions, of each seed, and the home say; answers and tasks are those of the first seed.

    Raises NotComparableError or ScoresError.
    """
    every = [JobReport.read(folder) for seeds in checkpoints.values() for folder in seeds]
    comparison = compare(every, [folder for seeds in evaluations for folder in seeds])
    first = {job: seeds[0] for job, seeds in checkpoints.items()}
    scored = [seeds[0] for seeds in evaluations]
    reports = comparison.reports
    folders = {job: CheckpointInputs.read(folder).job_folder for job, folder in first.items()}
    base = reports[0].base_model_digest
    digests = {BASE_MODEL: base, **{report.job: report.checkpoint_digest for report in reports}}
    answers = read_answers(scored)
    return Study(
        comparison=comparison,
        specs={report.job: JobFolder.read(store.home / folders[report.job]).spec for report in reports},
        base_model=BaseModelFacts(preset.name, preset.title, base),
        data=dataset_facts(store, Evaluation.read(scored[0]).testing_split, datasets, data),
        samples={model: answers[model] for model in digests if model in answers},
        answers=kept_answers(store, {job: folder.name for job, folder in first.items()}),
        tasks=kept_tasks(store, digests),
    )
