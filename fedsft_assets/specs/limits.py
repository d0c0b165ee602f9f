"""Settings of splits, and thresholds of the asset checks."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, field_validator, model_validator

from fedsft_assets.specs.yaml_file import Spec

Severity = Literal["error", "warn"]
CheckName = Literal["row_count", "no_empty_outputs", "no_prompt_overlap", "token_lengths", "languages", "duplicates"]
_SEVERITIES = TypeAdapter(dict[CheckName, Severity])


class SplitSettings(Spec):
    """How records are split, equally for all datasets of a study, so that a prompt is in the same split everywhere."""

    seed: int = 1234
    proportions: Annotated[list[float], Field(min_length=3, max_length=3)] = [0.8, 0.1, 0.1]
    max_rejected: Annotated[float, Field(ge=0, le=1, description="share of rows that may be unusable")] = 0.01
    max_chars: Annotated[int, Field(ge=1, description="characters of an input or output")] = 200_000

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if min(self.proportions) <= 0 or not math.isclose(sum(self.proportions), 1):
            raise ValueError(
                "proportions: expected 3 positive shares that add up to 1, for training, validation and testing, "
                f"found {self.proportions}"
            )
        return self


class CheckSettings(Spec):
    """Thresholds and severities of the asset checks; an error stops downstream assets."""

    min_rows: Annotated[float, Field(ge=0, description="records, as a share of the last materialization's")] = 0.5
    max_rows: Annotated[float, Field(gt=0, description="records, as a multiple of the last materialization's")] = 10.0
    max_truncated: Annotated[float, Field(ge=0, le=1, description="share of records longer than the window")] = 0.2
    max_duplicates: Annotated[float, Field(ge=0, le=1, description="share of rows")] = 0.05
    languages: Annotated[list[str], Field(min_length=1, description="ISO 639-1 codes")] = ["en"]
    min_language_share: Annotated[float, Field(ge=0, le=1, description="share of records in these languages")] = 0.8
    severity: Annotated[dict[str, str], Field(description="overrides of the checks' severities")] = {}

    @field_validator("severity")
    @classmethod
    def _known(cls, severities: dict[str, str]) -> dict[str, str]:
        """Validated here, since Dagster's configuration has no literal types."""
        _SEVERITIES.validate_python(severities)
        return severities
