"""Studies drawn from real losses, of which the truth is known.

`prompt_losses.csv` has the answer tokens and summed losses of the tiny model on 580 prompts that it was not trained
on: 405 of Alpaca, 66 of Dolly and 109 of OASST1 with 277 answers, under the base model, a model of each dataset alone
(one seed), and the centralized and the federated one (three seeds each). A study draws prompts from these with
replacement, so the truth is the ratio of sums over all of them. It draws seeds as Gaussian mixtures of what the real
ones differ by from their mean, so their spread over prompts, and from prompt to prompt, is the real one.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedsft_assets.evaluation.statistics.prompt_losses import Model, PromptLosses
from fedsft_assets.evaluation.statistics.score_table import by_prompt

PAIRS = [("fedavg", other) for other in ("alpaca", "dolly", "oasst1", "combined", "base")]
ONE_SEED = ["base", "alpaca/1", "dolly/1", "oasst1/1", "combined/1", "fedavg/1"]
FIXTURE = Path(__file__).with_name("prompt_losses.csv")
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """All prompts there are: `tokens` [C], and for each job the losses of its seeds [S, C]."""

    tokens: Numbers
    losses: dict[str, Numbers]

    def truth(self, job: str, other: str) -> float:
        """Of job minus other over all prompts and seeds, in nats a token."""
        mean = self.losses[job].mean(axis=0) - self.losses[other].mean(axis=0)
        return float(mean.sum() / self.tokens.sum())

    def equal(self) -> "Population":
        """The same prompts and spreads, but the loss of every job is that of the first."""
        rates = {job: losses.mean(axis=0).sum() / self.tokens.sum() for job, losses in self.losses.items()}
        first = next(iter(rates.values()))
        shifted = {job: losses + (first - rates[job]) * self.tokens for job, losses in self.losses.items()}
        return Population(self.tokens, shifted)

    def with_seeds_apart(self, times: float) -> "Population":
        """What seeds differ by, so many times over."""
        means = {job: losses.mean(axis=0) for job, losses in self.losses.items()}
        return Population(self.tokens, {job: means[job] + times * (x - means[job]) for job, x in self.losses.items()})

    def study(self, generator: np.random.Generator, prompts: int, seeds: int) -> PromptLosses:
        """That many prompts, and models of every job: `seeds` of a job that has seeds here, one of any other."""
        drawn = generator.integers(len(self.tokens), size=prompts)
        models, rows = [], []
        for job, losses in self.losses.items():
            mean, count = losses.mean(axis=0)[drawn], len(losses)
            if count == 1:
                models.append(Model(job, None))
                rows.append(mean)
                continue
            apart = losses[:, drawn] - mean
            for seed in range(seeds):
                models.append(Model(job, seed))
                rows.append(mean + generator.normal(size=count) @ apart / np.sqrt(count - 1))
        return PromptLosses(tuple(models), self.tokens[drawn], np.stack(rows), prompts)


@cache
def real_losses() -> pd.DataFrame:
    """One row for each record."""
    return pd.read_csv(FIXTURE)


def population(*jobs: str, one_seed: bool = False) -> Population:
    """The prompts of the fixture, with these jobs, as `fedavg`; `one_seed` takes the first alone as what there is."""
    sums = real_losses().drop(columns="dataset").groupby("prompt").sum()
    losses = {}
    for job in jobs:
        columns = [name for name in sums if name.split("/")[0] == job]
        losses[job] = sums[columns[:1] if one_seed else columns].to_numpy(np.float64).T
    return Population(sums["tokens"].to_numpy(np.float64), losses)


def score_table(columns: list[str] | None = None) -> pd.DataFrame:
    """The real evaluations as they are handed in: one row for each model and record."""
    wide = real_losses()
    parts = []
    for column in columns or wide.columns[3:]:
        job, _, seed = column.partition("/")
        rows = wide[["dataset", "tokens"]].assign(
            job=job,
            seed=int(seed) if seed else None,
            record=[f"record-{index}" for index in range(len(wide))],
            prompt=[f"prompt-{number}" for number in wide["prompt"]],
            loss=wide[column],
        )
        parts.append(rows)
    return pd.concat(parts, ignore_index=True).astype({"seed": "Int64"})


def real_scores(prompts: int | None = None, columns: list[str] | None = None) -> PromptLosses:
    scores = by_prompt(score_table(columns))
    kept = slice(0, prompts)
    return replace(scores, tokens=scores.tokens[kept], losses=scores.losses[:, kept], records=len(scores.tokens[kept]))
