"""All that is known of a study, for its report and for `comparison.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedsft_assets.evaluation.answers import ANSWERS_FILE, Answers
from fedsft_assets.evaluation.comparison import Comparison, NotComparableError, shown
from fedsft_assets.evaluation.report.recommendation import Recommendation, recommend
from fedsft_assets.evaluation.report.site_gains import SiteGain, gains_table, site_gains
from fedsft_assets.evaluation.report.study_facts import NOT_STATED, BaseModelFacts, DatasetFacts
from fedsft_assets.evaluation.sample_answers import SampleAnswer, scores_table
from fedsft_assets.evaluation.tasks import TASKS_FILE, TaskReport, TaskResult, task_table
from fedsft_assets.files import publish_file
from fedsft_assets.model.errors import listed
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store
from fedsft_assets.versions import NoVersionError, current

_LISTED = 6  # names in a sentence


@dataclass(frozen=True)
class Study:
    """A comparison with what belongs to it.

    `specs` are those that the jobs were trained with, `samples` the answers of models to a sample of the testing split,
    `answers` those to the example prompts, None if there are none of these checkpoints; `tasks` are results of
    benchmark tasks. `data` is None if the home has the splits no longer. Models are in the order of the matrix.
    """

    comparison: Comparison
    specs: Mapping[str, JobSpec]
    base_model: BaseModelFacts
    data: Sequence[DatasetFacts] | None
    samples: Mapping[str, Sequence[SampleAnswer]]
    answers: Answers | None
    tasks: Mapping[str, Sequence[TaskResult]]

    @cached_property
    def recommendation(self) -> Recommendation:
        return recommend(self.comparison, self.gains)

    @cached_property
    def gains(self) -> list[SiteGain]:
        return site_gains(self.comparison, self.specs)

    @property
    def models(self) -> list[str]:
        """The base model, then the jobs."""
        return [str(model) for model in self.comparison.matrix.index]

    @cached_property
    def task_table(self) -> str:
        """The results of benchmark tasks in Markdown, or why they do not compare; empty without any."""
        if not self.tasks:
            return ""
        try:
            return task_table({shown(model): results for model, results in self.tasks.items()})
        except NotComparableError as error:
            return f"Benchmark tasks: {error}."

    def markdown(self) -> str:
        """The content of `comparison.md`."""
        chosen = self.recommendation
        parts = [f"**{chosen.headline}.** {chosen.why}"]
        parts.append(self.comparison.markdown())
        if self.gains:
            parts.append(gains_table(self.gains))
        if self.samples:
            parts.append(scores_table({shown(model): answers for model, answers in self.samples.items()}))
        if self.task_table:
            parts.append(self.task_table)
        parts.append("Not run:\n\n" + "\n".join(f"- {what}." for what in self.not_run()))
        return "\n\n".join(parts)

    def write_markdown(self, path: Path) -> None:
        with publish_file(path) as fresh:
            fresh.write_text(self.markdown() + "\n", encoding="utf-8")

    def not_run(self) -> Iterator[str]:
        """What the study does not know, in sentences without a full stop."""
        reports = self.comparison.reports
        if single := [job for job, seeds in self.comparison.runs.items() if len(seeds) == 1]:
            jobs = "each job" if len(single) == len(self.comparison.runs) else listed(single, most=_LISTED)
            yield f"One seed for {jobs}: another training with another seed may differ"
        else:
            yield "Costs, answers and benchmark tasks are those of the first seed alone"
        for kind, unknown in (
            ("federated", "what training together gives is not known"),
            ("local", "what a site reaches alone is not known"),
            ("centralized", "what all data in one place would give is not known"),
        ):
            if not any(report.kind == kind for report in reports):
                yield f"No {kind} job: {unknown}"
        for spec in self.specs.values():
            for site in spec.private_sites:
                yield f"No test on the private data of {site} in {spec.name}: it is at the site alone"
        for report in reports:
            for site, rounds in report.missed.items():
                yield f"{site} took no part in {len(rounds)} of the {report.rounds} rounds of {report.job}"
        yield from self._without("answers to test records", self.samples)
        if self.answers is None:
            yield "No answers of these checkpoints to the example prompts: materialize `inference`"
        if self.tasks:
            yield from self._without("benchmark tasks", self.tasks)
        else:
            yield "No benchmark tasks: `fedsft tasks --checkpoint <job>`, then `comparison` again"
        yield "Answers were neither judged by people nor tested for safety"
        if unstated := [one.name for one in self.data or () if one.license == NOT_STATED]:
            yield f"No license stated for {listed(unstated, most=_LISTED)}: add `license` to its file in datasets/"

    def _without(self, what: str, found: Mapping[str, object]) -> Iterator[str]:
        if missing := [shown(model) for model in self.models if model not in found]:
            yield f"No {what} of {listed(missing, most=_LISTED)}"


def kept_tasks(store: Store, digests: Mapping[str, str]) -> dict[str, tuple[TaskResult, ...]]:
    """What `fedsft tasks` has left in the home, by model; `digests` are those of the checkpoints."""
    folders = {model: store.tasks(digest) for model, digest in digests.items()}
    return {
        model: TaskReport.read(folder).results for model, folder in folders.items() if (folder / TASKS_FILE).exists()
    }


def kept_answers(store: Store, versions: Mapping[str, str]) -> Answers | None:
    """The current version of `inference`, if it is of these versions of checkpoints, by job."""
    try:
        path = current(store.report("inference")) / ANSWERS_FILE
    except NoVersionError:
        return None
    if not path.exists():  # of an earlier version
        return None
    answers = Answers.read_json(path)
    return answers if answers.versions == versions else None
