"""What each site has of a federated model: its loss on the site's own test records, beside other models' there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsft_assets.evaluation.comparison import SHOWN_BASE_MODEL, Comparison, as_scores
from fedsft_assets.evaluation.markdown import markdown_table
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec

if TYPE_CHECKING:
    from fedsft_assets.evaluation.statistics.intervals import Estimate

_HEADERS = ("federated job", "site", "tested on", "test loss", "gain over its own model", "gain over the base model")


@dataclass(frozen=True)
class Gain:
    """How much lower a loss is than another, in nats a token, with its 95 % interval; above 0 is better."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, difference: Estimate) -> Gain:
        """Of a loss minus the other one."""
        return cls(-difference.value, -difference.high, -difference.low)

    def __str__(self) -> str:
        known = math.isfinite(self.high - self.low)
        interval = f"{self.low:+.3f} to {self.high:+.3f}" if known else "interval unknown"
        return f"{self.value:+.3f} ({interval})".replace("-", "−")


@dataclass(frozen=True)
class SiteGain:
    """Of a federated `job` at a `site`, on the testing split of the site's `dataset`.

    `local_job` trained on that dataset alone, the best of several; without one, `over_local` is None.
    """

    job: str
    site: str
    dataset: str
    loss: float
    over_base: Gain
    local_job: str | None
    over_local: Gain | None

    @property
    def own_is_better(self) -> bool:
        """Whether the site's own model is measurably better there."""
        return self.over_local is not None and self.over_local.high < 0


def dataset_scores(comparison: Comparison) -> dict[str, dict[str, Estimate]]:
    """The loss of each model on each dataset, and on all of them as `combined`, with its interval."""
    from fedsft_assets.evaluation.statistics.intervals import score_jobs
    from fedsft_assets.evaluation.statistics.score_table import by_prompt

    own = comparison.losses.groupby("dataset", sort=True)
    return {
        COMBINED: comparison.scores,
        **{str(dataset): score_jobs(by_prompt(as_scores(records))) for dataset, records in own},
    }


def site_gains(comparison: Comparison, specs: Mapping[str, JobSpec]) -> list[SiteGain]:
    """Of all federated jobs, by site; `specs` are those that the jobs were trained with. Private data is not here."""
    from fedsft_assets.evaluation.statistics.intervals import compare_pairs
    from fedsft_assets.evaluation.statistics.score_table import by_prompt

    matrix, gains = comparison.matrix, []
    federated = [report.job for report in comparison.reports if report.kind == "federated"]
    for dataset, records in comparison.losses.groupby("dataset", sort=True):
        name = str(dataset)
        trained = [
            (job, site)
            for job in federated
            for site, spec in specs[job].sites.items()
            if spec.dataset == name and not spec.private
        ]
        local = [report.job for report in comparison.reports if _is_local(specs[report.job], name)]
        own = min(local, key=lambda job: float(matrix[name].loc[job])) if local else None
        others = [SHOWN_BASE_MODEL, *([own] if own else [])]
        pairs = [(job, other) for job in dict.fromkeys(job for job, _ in trained) for other in others]
        found = compare_pairs(by_prompt(as_scores(records)), pairs) if pairs else {}
        gains += [
            SiteGain(
                job=job,
                site=site,
                dataset=name,
                loss=float(matrix[name].loc[job]),
                over_base=Gain.of(found[job, SHOWN_BASE_MODEL]),
                local_job=own,
                over_local=Gain.of(found[job, own]) if own else None,
            )
            for job, site in trained
        ]
    return sorted(gains, key=lambda gain: (federated.index(gain.job), gain.site))


def gain_sentences(gains: Sequence[SiteGain]) -> list[str]:
    """For each federated job the site that gains least, and how far apart the most and the least gain are."""
    said = []
    for job in dict.fromkeys(gain.job for gain in gains):
        own = [gain for gain in gains if gain.job == job]
        over_own = {gain.site: gain.over_local for gain in own if gain.over_local}
        beside = "its own model" if len(over_own) == len(own) else "the base model"
        of = over_own if len(over_own) == len(own) else {gain.site: gain.over_base for gain in own}
        worst = min(own, key=lambda gain: of[gain.site].value)
        values = [gain.value for gain in of.values()]
        where = f"{worst.site} ({worst.dataset})"
        sentence = f"{job}: worst site {where}, with a gain of {of[worst.site]} nats a token over {beside}"
        if len(own) > 1:
            sentence += f"; spread over {len(own)} sites: {max(values) - min(values):.3f}"
        said.append(sentence)
    return said


def gains_table(gains: Sequence[SiteGain]) -> str:
    """The gains as Markdown."""
    rows = [
        (
            gain.job,
            gain.site,
            gain.dataset,
            f"{gain.loss:.4f}",
            f"{gain.over_local}" if gain.over_local else "no local job",
            f"{gain.over_base}",
        )
        for gain in gains
    ]
    said = "\n".join(f"- {sentence}." for sentence in gain_sentences(gains))
    return f"{markdown_table(_HEADERS, rows, texts=3)}\n\n{said}"


def _is_local(spec: JobSpec, dataset: str) -> bool:
    return spec.kind == "local" and spec.datasets == [dataset]
