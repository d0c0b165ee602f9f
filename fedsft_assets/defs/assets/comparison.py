"""`comparison`: one table and one plot over all jobs."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from fedsft_assets.champion import move_champion
from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.metadata import image
from fedsft_assets.defs.resources import MLflowResource, ModelResource, StoreResource
from fedsft_assets.evaluation.comparison import NotComparableError, compare, write_table
from fedsft_assets.evaluation.curves import plot
from fedsft_assets.evaluation.statistics.prompt_losses import ScoresError
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.files import file_digest
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import BASE_MODEL, JobSpec
from fedsft_assets.versions import adding


def comparison_asset(jobs: Sequence[JobSpec]) -> dg.AssetsDefinition:
    names = [job.name for job in jobs]

    @dg.asset(
        group_name="comparison",
        kinds={"markdown", "matplotlib"},
        ins={
            f"{kind}_{name}": dg.AssetIn([kind, name])
            for kind, models in (("checkpoint", names), ("evaluation", [BASE_MODEL, *names]))
            for name in models
        },
        description="All jobs and the base model side by side: losses, intervals and verdicts.",
    )
    def comparison(
        store: StoreResource, model: ModelResource, mlflow: MLflowResource, **versions: Path
    ) -> dg.MaterializeResult[Path]:
        files = store.files
        evaluations = [versions[f"evaluation_{name}"] for name in (BASE_MODEL, *names)]
        reports = [JobReport.read(versions[f"checkpoint_{name}"]) for name in names]
        with as_dagster_failure(NotComparableError, ScoresError):
            result = compare(reports, evaluations)
            champion = move_champion(evaluations, files, model.load(), mlflow.tracking)
        with adding(files.report("comparison")) as addition:
            write_table(result, addition.folder / "comparison.md")
            plot(result.reports, addition.folder / "comparison.png")
        table, chart = addition.version / "comparison.md", addition.version / "comparison.png"
        return dg.MaterializeResult(
            value=addition.version,
            data_version=dg.DataVersion(file_digest(table)),
            metadata={
                "table": dg.MetadataValue.md(result.markdown()),
                "validation loss": image(chart),
                "champion": dg.MetadataValue.md(champion.markdown()),
                **{f"{report.job}: best validation loss": round(report.best_val_loss, 4) for report in result.reports},
                "base model's test loss": round(float(result.matrix[COMBINED].loc[BASE_MODEL]), 4),
                "table file": dg.MetadataValue.path(table),
                "plot file": dg.MetadataValue.path(chart),
            },
        )

    return comparison
