"""The picture of the curves of all jobs."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from fedsft_assets.evaluation.curves import XAxis, plot
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets_tests.evaluation.studies import REPORTS


def _png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.parametrize("reports", [REPORTS, REPORTS[:1], REPORTS * 4, REPORTS * 50], ids=["all", "one", "16", "200"])
def test_plot_is_a_picture_of_the_size_of_a_page(tmp_path: Path, reports: list[JobReport]) -> None:
    path = tmp_path / "reports" / "comparison.png"
    plot(reports, path)
    width, height = _png_size(path)
    assert 1000 <= width <= 2000
    assert 500 <= height <= 1200
    assert 10_000 < path.stat().st_size < 500_000
    assert [file.name for file in path.parent.iterdir()] == ["comparison.png"]


def test_plot_shows_the_curve_of_each_job(tmp_path: Path) -> None:
    """Another loss of one job at one round changes the picture; the same reports give the same one."""
    plot(REPORTS, tmp_path / "one.png")
    plot(REPORTS, tmp_path / "same.png")
    plot([replace(REPORTS[0], val_loss=[7.0, 3.2, 0.9, 1.1]), *REPORTS[1:]], tmp_path / "other.png")
    one, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "same", "other"))
    assert one == same
    assert one != other


@pytest.mark.parametrize("over", ["bytes", "seconds"])
def test_curves_are_drawn_over_what_is_asked_for(tmp_path: Path, over: XAxis) -> None:
    """A change of it in one job changes the picture, as does not knowing it."""
    known = replace(REPORTS[0], transferred=[1, 2, 3, 4], elapsed=[1.0, 2.0, 3.0, 4.0])
    field = {"bytes": "transferred", "seconds": "elapsed"}[over]
    reports = {
        "one": known,
        "same": replace(known),
        "other": replace(known, **{field: [1, 2, 3, 40]}),
        "unknown": replace(known, **{field: None}),
    }
    for name, report in reports.items():
        plot([report, *REPORTS[1:]], tmp_path / name, over)
    pictures = {name: (tmp_path / name).read_bytes() for name in reports}
    assert pictures["one"] == pictures["same"]
    assert len(set(pictures.values())) == 3


def test_curves_over_another_validation_split_have_a_panel_of_their_own(tmp_path: Path) -> None:
    plot([replace(REPORTS[0], validation_digest="w" * 64), *REPORTS[1:]], tmp_path / "two.png")
    plot(REPORTS, tmp_path / "one.png")
    (width, height), (other_width, other_height) = (_png_size(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert (other_width, other_height) == (width, 2 * height)
