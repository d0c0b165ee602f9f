"""The report of a folder of splits, written beside them."""

from collections.abc import Collection
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsft_assets.data.records import DataError
from fedsft_assets.files import digest_of
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.versions import versions_of

REPORT_FILE = "report.json"


class SplitReport(BaseModel):
    """Records per split, rows dropped from `rows` raw rows, split settings, and digests.

    `digest` is of the three files together, `files` has the SHA-256 of each. For `combined`, `rows` counts
    the records of all datasets, and `parts` has the version name of each dataset.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    digest: str
    files: dict[str, str]
    settings: SplitSettings
    counts: dict[str, int]
    rows: int
    duplicates: int
    rejected: int
    parts: dict[str, str] = {}

    @property
    def records(self) -> int:
        """Records in all splits together."""
        return sum(self.counts.values())

    def as_metadata(self) -> dict[str, int]:
        """The counts by name; the digest is the data version, not metadata."""
        return {
            **self.counts,
            "records": self.records,
            "rows": self.rows,
            "duplicates": self.duplicates,
            "rejected": self.rejected,
        }

    @classmethod
    def of(
        cls,
        name: str,
        files: dict[str, str],
        settings: SplitSettings,
        counts: dict[str, int],
        rows: int,
        duplicates: int,
        rejected: int = 0,
        parts: dict[str, str] | None = None,
        unused: Collection[str] = (),
    ) -> Self:
        """Build the report of splits with these digests. Raises DataError if a split that is used is empty."""
        for split, count in counts.items():
            if count == 0 and split not in unused:
                raise DataError(
                    f"{name}: the {split} split is empty, all splits together hold {sum(counts.values())} records; "
                    "add rows, or give that split a larger proportion"
                )
        return cls(
            name=name,
            digest=digest_of(files),
            files=files,
            settings=settings,
            counts=counts,
            rows=rows,
            duplicates=duplicates,
            rejected=rejected,
            parts=parts or {},
        )

    def write(self, folder: Path) -> None:
        (folder / REPORT_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the report in a folder of splits. Raises DataError if it is missing or invalid."""
        path = folder / REPORT_FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; generate the splits first") from error
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise DataError(f"{path}: is not a split report ({reason}); regenerate the splits") from error


def version_with(versions: Path, digest: str) -> Path | None:
    """The version of splits with this digest; None if there is none that can be read."""
    for version in versions_of(versions):
        try:
            if SplitReport.read(version).digest == digest:
                return version
        except DataError:
            continue
    return None
