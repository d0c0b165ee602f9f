"""The report as a page: what is in it, that it loads nothing, and that texts of data stay texts."""

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedsft_assets.evaluation.report.curve_chart import chart
from fedsft_assets.evaluation.report.heat_map import STEPS
from fedsft_assets.evaluation.report.page import readable_duration, readable_size, render, write_report
from fedsft_assets.evaluation.report.study import Study
from fedsft_assets.evaluation.tasks import TaskResult
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.specs.job import BASE_MODEL
from fedsft_assets_tests.evaluation.studies import (
    REPORTS,
    TEST_LOSSES,
    evaluation,
    example_answers,
    job_report,
    many_jobs,
    study,
)

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>&amp;"
CSS = Path(__file__).parents[3] / "fedsft_assets" / "evaluation" / "report" / "templates" / "report.css"


class _Page(HTMLParser):
    """Elements with their attributes, texts, headings and the cells of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.headings: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("h1", "h2"):
            self.headings.append("")
        if tag not in ("meta", "line", "path", "polyline", "rect", "circle"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] in ("h1", "h2"):
            self.headings[-1] += data
        if "style" not in self._inside:
            self.text += data


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [evaluation(tmp_path / model, model, loss) for model, loss in TEST_LOSSES.items()]


@pytest.fixture
def found(folders: list[Path]) -> Study:
    models = dict.fromkeys(TEST_LOSSES, SCRIPT)
    return study(REPORTS, folders, models, answers=example_answers({"base model": "x", "fedavg": SCRIPT}, SCRIPT))


def test_verdict_comes_first_and_what_was_not_run_last(found: Study) -> None:
    page = _Page(render(found))
    assert page.headings == [
        "Use fedavg, a federated model",
        "Test loss of each model on each dataset",
        "What each site gains",
        "Loss during training",
        "What each job cost",
        "Benchmark tasks",
        "Answers",
        "Data, licenses and base model",
        "What was not run",
    ]
    places = [page.text.index(sentence) for sentence in found.comparison.sentences]
    assert max(places) < page.text.index("Test loss of each model")


def test_texts_of_models_and_data_are_not_markup(found: Study) -> None:
    html = render(found)
    page = _Page(html)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "img" not in {tag for tag, _ in page.elements}
    assert page.text.count(SCRIPT) >= 2 * len(TEST_LOSSES) + 2


def test_page_loads_nothing(found: Study) -> None:
    html = render(found)
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    loading = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all((value or "").startswith("#") for value in loading)
    assert not re.search(r"https?:|url\(|@import|//cdn", html)


def test_page_follows_light_and_dark_and_prints(found: Study) -> None:
    html = render(found)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "size: A4" in html


def test_same_study_gives_the_same_bytes(found: Study, tmp_path: Path) -> None:
    write_report(found, tmp_path / "one.html")
    write_report(found, tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_licenses_are_beside_the_models_that_were_trained_on_the_data(found: Study) -> None:
    text = _Page(render(found)).text
    assert "It was trained on data under these terms: CC BY-NC 4.0 (alpaca); CC BY-SA 3.0 (dolly)." in text
    rows = "".join(text.split("Data, licenses and base model")[1].split())
    assert "alpacaAlpacaCCBY-NC4.01,000" in rows
    assert "fedavgalpaca,dollyCCBY-NC4.0(alpaca);CCBY-SA3.0(dolly)" in rows


def test_what_is_missing_is_said(folders: list[Path]) -> None:
    text = _Page(render(replace(study(REPORTS, folders), data=None))).text
    assert "No answers of these checkpoints to the example prompts" in text
    assert "No answers to test records of base model, alpaca, oasst1, combined, fedavg" in text
    assert "No benchmark tasks" in text
    assert "One seed for each job" in text
    assert "has the splits that these models were tested on no longer" in text


def test_tasks_are_shown_by_model(folders: list[Path]) -> None:
    result = TaskResult("piqa", "acc", 0.625, 0.01, 50, 1838, 0, "1.0", "lm-eval 0.4.13")
    tasks = {"fedavg": [result], BASE_MODEL: [replace(result, value=0.5, stderr=None, samples=1838)]}
    found = study(REPORTS, folders, tasks=tasks)
    text = " ".join(_Page(render(found)).text.split())
    assert "0.6250 ± 0.010050 of 1,838 questions, 0-shot" in text
    assert "0.50001,838 of 1,838 questions, 0-shot" in text
    assert "No benchmark tasks of alpaca, oasst1, combined" in text
    assert "score them again" in found.markdown()  # they were not asked the same


def test_measurements_are_shown_where_a_report_has_them(folders: list[Path]) -> None:
    traffic = {"site-1": {"sent": 1_000_000, "received": 2_000_000}, "site-2": {"sent": 500_000, "received": 0}}
    measured = replace(REPORTS[0], steps=1200, traffic=traffic, cpu_seconds=7200.0, peak_memory=3_200_000_000)
    text = _Page(render(study([measured, *REPORTS[1:]], folders))).text
    for shown in ("optimizer steps", "1,200", "sites sent", "1.5 MB", "2.0 MB", "2.0 h", "3.2 GB", "not measured"):
        assert shown in text
    assert "sites sent" not in _Page(render(study(REPORTS, folders))).text


@pytest.mark.parametrize("local", [0, 4, 59])
def test_page_of_any_number_of_jobs_has_a_row_for_each(tmp_path: Path, local: int) -> None:
    reports, folders = many_jobs(tmp_path, local)
    models = {model: f"answer of {model}" for model in (BASE_MODEL, *(report.job for report in reports))}
    page = _Page(render(study(reports, folders, models)))
    cells = [
        attributes for tag, attributes in page.elements if tag == "td" and "cell" in (attributes.get("class") or "")
    ]
    assert len(cells) == (local + 2) * 3
    lines = [attributes for tag, attributes in page.elements if tag == "polyline"]
    assert len(lines) == 2 * (local + 1)
    summaries = [tag for tag, _ in page.elements if tag == "summary"]
    assert ("All" in page.text and len(summaries) == 5) == (local == 59)
    assert all(f"answer of {report.job}" in page.text for report in reports)


def test_names_of_lines_do_not_cover_each_other() -> None:
    reports = [job_report(f"job-{number}", "local", [7.0, 1.0 + number / 1000], 1) for number in range(8)]
    drawn = chart(reports, 760, 380, labels=True)
    places = sorted(line.label_at[1] for line in drawn.lines)
    assert all(below - above >= 15 for above, below in itertools.pairwise(places))
    assert all(drawn.top <= place <= drawn.bottom for place in places)


def test_curve_goes_through_its_losses_from_left_to_right() -> None:
    drawn = chart([job_report("a", "federated", [4.0, 2.0, 0.0], 2)], 760, 380, labels=False)
    points = [tuple(map(float, point.split(","))) for point in drawn.lines[0].points.split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x0, x2) == (drawn.left, drawn.right)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.2)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2)
    assert y2 == drawn.bottom
    assert drawn.lines[0].best == (x2, y2)


def _luminance(color: str) -> float:
    """The relative luminance of WCAG 2."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_texts_of_the_heat_map_have_the_contrast_that_wcag_asks_for() -> None:
    found = re.findall(r"--h(\d): (#\w{6}); --t\d: (#\w{6});", CSS.read_text(encoding="utf-8"))
    assert [int(step) for step, _, _ in found] == [*range(STEPS)] * 3  # light, dark, print
    for _, background, color in found:
        low, high = sorted((_luminance(background), _luminance(color)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
    for ramp in (found[:STEPS], found[STEPS : 2 * STEPS]):
        steps = [_luminance(background) for _, background, _ in ramp]
        assert steps in (sorted(steps), sorted(steps, reverse=True))  # readable without colors


@pytest.mark.parametrize(
    ("count", "said"), [(999, "999 B"), (1500, "1.5 kB"), (3_200_000_000, "3.2 GB"), (2.5e15, "2500.0 TB")]
)
def test_sizes_are_readable(count: float, said: str) -> None:
    assert readable_size(count) == said


@pytest.mark.parametrize(("seconds", "said"), [(61.6, "62 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_readable(seconds: float, said: str) -> None:
    assert readable_duration(seconds) == said


def test_study_over_several_seeds_says_so_and_shows_means(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / model, model, loss) for model, loss in TEST_LOSSES.items()]
    second = [replace(report, seed=1235) for report in REPORTS]
    again = [evaluation(tmp_path / "2" / one.job, one.job, TEST_LOSSES[one.job] + 0.1, seed=1235) for one in second]
    page = _Page(render(study([*REPORTS, *second], [*folders, *again])))
    assert "Every job was trained with the seeds 1234, 1235; values are means over them." in page.text
    assert "4 jobs" in page.text
    assert "1.050" in page.text
    assert "One seed for each job" not in page.text
    assert "Costs, answers and benchmark tasks are those of the first seed alone" in page.text


def test_losses_are_drawn_over_bytes_and_time_too_where_all_jobs_say_them(folders: list[Path]) -> None:
    def measured(report: JobReport) -> JobReport:
        rounds = range(len(report.val_loss))
        return replace(report, transferred=[5_000_000 * k for k in rounds], elapsed=[2.0 * k for k in rounds])

    page = _Page(render(study([measured(report) for report in REPORTS], folders)))
    assert len([tag for tag, _ in page.elements if tag == "polyline"]) == 3 * 2 * len(REPORTS)
    for axis in ("records trained on", "MB sent by sites and to them", "seconds since the start of the job"):
        assert axis in page.text
    partly = _Page(render(study([measured(REPORTS[0]), *REPORTS[1:]], folders)))
    assert len([tag for tag, _ in partly.elements if tag == "polyline"]) == 2 * len(REPORTS)
