"""Studies of made-up losses, for the tables, the report and what is said in words."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fedsft_assets.evaluation.answers import Answers
from fedsft_assets.evaluation.comparison import compare
from fedsft_assets.evaluation.prompts import ExamplePrompt
from fedsft_assets.evaluation.record_scores import LOSSES_FILE, Evaluation
from fedsft_assets.evaluation.report.study import Study
from fedsft_assets.evaluation.report.study_facts import BaseModelFacts, DatasetFacts
from fedsft_assets.evaluation.sample_answers import SampleAnswer
from fedsft_assets.evaluation.tasks import TaskResult
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.specs.job import BASE_MODEL, JobSpec, SiteSpec

RECORDS = 40
TEST_LOSSES = {"base_model": 7.25, "fedavg": 1.0, "combined": 0.9, "oasst1": 6.4, "alpaca": 6.2}


def job_report(job: str, kind: str, val_loss: list[float], best_round: int) -> JobReport:
    return JobReport(
        job=job,
        kind=kind,
        rounds=len(val_loss) - 1,
        best_round=best_round,
        tokens=12_345_678,
        samples=[16 * k for k in range(len(val_loss))],
        val_loss=val_loss,
        test_loss=0.0,
        perplexity=0.0,
        seconds=61.6,
        phases={"train": 1.0},
        checkpoint_digest=job,
        base_model_digest="b" * 64,
        validation_digest="v" * 64,
        runtime="simulator",
        job_id="simulate_job",
        status="finished",
        missed={},
        seed=1234,
    )


REPORTS = [
    job_report("fedavg", "federated", [7.0, 1.2, 0.9, 1.1], 2),
    job_report("combined", "centralized", [7.0, 1.0, 0.8], 2),
    job_report("oasst1", "local", [7.0, 6.5], 1),
    job_report("alpaca", "local", [7.0, 6.1, 7.5], 1),
]


def evaluation(folder: Path, model: str, loss: float, testing_split: str = "t" * 64, seed: int = 1234) -> Path:
    folder.mkdir(parents=True)
    if model == "base_model":
        Evaluation(model, "b" * 64, testing_split, 256).write(folder)
    else:
        Evaluation(model, model, testing_split, 256, seed).write(folder)  # digests are those of the reports
    spread = np.random.default_rng(len(model)).uniform(0.9, 1.1, RECORDS)
    tokens = np.resize([10, 30], RECORDS)
    names = [f"record {number}" for number in range(RECORDS)]
    losses = {"dataset": np.resize(["dolly", "alpaca"], RECORDS), "record": names, "prompt": names, "first": True}
    sums = tokens * spread
    pd.DataFrame({**losses, "tokens": tokens, "loss": sums * loss * tokens.sum() / sums.sum()}).to_parquet(
        folder / LOSSES_FILE
    )
    return folder


def spec_of(report: JobReport, datasets: Sequence[str]) -> JobSpec:
    """The job of this report: a local one has the dataset of its name, or the first."""
    if report.kind == "federated":
        sites = {f"site-{number}": SiteSpec(dataset=name) for number, name in enumerate(datasets, 1)}
    elif report.kind == "centralized":
        sites = {"site-1": SiteSpec(dataset="combined")}
    else:
        sites = {"site-1": SiteSpec(dataset=report.job if report.job in datasets else datasets[0])}
    return JobSpec(name=report.job, description=report.job, sites=sites, rounds=report.rounds)


def study(
    reports: Sequence[JobReport],
    folders: Sequence[Path],
    texts: Mapping[str, str] | None = None,
    tasks: Mapping[str, Sequence[TaskResult]] | None = None,
    answers: Answers | None = None,
) -> Study:
    """The study of these jobs on alpaca and dolly; `texts` are each model's answers to both records of the sample."""
    datasets = [
        DatasetFacts("alpaca", "Alpaca", "the hub", "CC BY-NC 4.0", "a" * 64, {"training": 1000, "testing": 20}, 3),
        DatasetFacts("dolly", "Dolly", "a copy", "CC BY-SA 3.0", "d" * 64, {"training": 2000, "testing": 20}, 0),
    ]
    asked = {f"record {number}": (f"What is {number}?", str(number)) for number in (1, 2)}
    return Study(
        comparison=compare(reports, folders),
        specs={report.job: spec_of(report, ["alpaca", "dolly"]) for report in reports},
        base_model=BaseModelFacts("tiny", "a tiny model", "b" * 64),
        data=datasets,
        samples={
            model: [SampleAnswer(digest, *record, text) for digest, record in asked.items()]
            for model, text in (texts or {}).items()
        },
        answers=answers,
        tasks=tasks or {},
    )


def example_answers(models: Mapping[str, str], question: str = "Why?") -> Answers:
    """Answers to one example prompt, by model."""
    prompts = [ExamplePrompt(question=question)]
    return Answers(prompts, {model: [text] for model, text in models.items()}, GenerationSettings(48))


def many_jobs(folder: Path, local: int) -> tuple[list[JobReport], list[Path]]:
    """A federated job and so many local ones, with evaluations in the folder."""
    reports = [
        job_report("fedavg", "federated", [7.0, 2.0, 1.0], 2),
        *(job_report(f"site-model-{number}", "local", [7.0, 5.0 + number / 50], 1) for number in range(local)),
    ]
    losses = {BASE_MODEL: 7.0, **{report.job: report.val_loss[-1] for report in reports}}
    return reports, [evaluation(folder / model, model, loss) for model, loss in losses.items()]
