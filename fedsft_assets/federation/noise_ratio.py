"""How large a job's noise is beside what it covers, known before anything is trained."""

import math
from dataclasses import dataclass
from pathlib import Path

from fedsft_assets.specs.job import JobSpec, PrivacySpec
from fedsft_assets.specs.yaml_file import SpecError

# Noise of more than so many times what all rounds together can change at most leaves nothing of what sites learn: in 12
# rounds of the tiny preset, the loss fell from 7.2 to 6.4 at 10 times, and rose to 7.5 at 15 times.
MOST = 10.0


@dataclass(frozen=True)
class NoiseRatio:
    """The expected norm of the noise, in norms of a clipped change: each site adds noise to so many `numbers`.

    A Gaussian vector's norm is its deviation times the root of its length. The mean of equally heavy sites has noise
    that is smaller by the root of their number; rounds add noise in any direction, and changes in one at best.
    """

    privacy: PrivacySpec
    numbers: int
    sites: int
    rounds: int

    @property
    def of_site(self) -> float:
        """In the change that one site sends."""
        return self.privacy.noise_multiplier * math.sqrt(self.numbers)

    @property
    def of_round(self) -> float:
        """In the mean of all sites."""
        return self.of_site / math.sqrt(self.sites)

    @property
    def of_job(self) -> float:
        """In the sum of all rounds, if all changes go in one direction."""
        return self.of_round / math.sqrt(self.rounds)

    def require_less(self, job: str) -> None:
        """Raises SpecError for noise under which nothing can be learned, unless the job accepts that."""
        if self.of_job <= MOST or self.privacy.accept_useless_noise:
            return
        multiplier = self.privacy.noise_multiplier
        rounds = f"over all {self.rounds} rounds" if self.rounds > 1 else "in the one round"
        raise SpecError(
            f"jobs/{job}.yaml: filters.privacy.noise_multiplier: {multiplier:g}: nothing can be learned under so much"
            f" noise. On {self.numbers:,} numbers it has {_times(self.of_site)} the norm of a site's clipped change,"
            f" {_times(self.of_round)} in the mean of {self.sites} sites, and {_times(self.of_job)} {rounds} at best;"
            f" expected {MOST:g} times at most. Lower it to {multiplier * MOST / self.of_job:.2g}, send fewer numbers"
            " (training.peft, filters.exclude), or have more sites or rounds; with 'accept_useless_noise: true' in"
            " filters.privacy it runs all the same"
        )


def noise_ratio(spec: JobSpec, base_model: Path) -> NoiseRatio | None:
    """Of a job that starts from this archive; None for one without noise. Raises ModelError."""
    if spec.filters.privacy is None:
        return None
    return NoiseRatio(spec.filters.privacy, _sent_numbers(spec, base_model), len(spec.sites), spec.rounds)


def _sent_numbers(spec: JobSpec, base_model: Path) -> int:
    """How many numbers a site sends; no weight is read."""
    import torch

    from fedsft_assets.federation.site.update_filters import ChangeFilter
    from fedsft_assets.model.archive.nemo_archive import read_config
    from fedsft_assets.model.language_model import LanguageModel

    chosen = ChangeFilter(spec.filters)
    with torch.device("meta"):
        model = LanguageModel(read_config(base_model), {})
        if spec.training.peft:
            from fedsft_assets.model.training.lora import add_adapters

            add_adapters(model, spec.training.peft, spec.seed)
    return sum(tensor.numel() for name, tensor in model.distinct_parameters().items() if chosen.keeps(name))


def _times(ratio: float) -> str:
    return f"{ratio:,.3g} times"
