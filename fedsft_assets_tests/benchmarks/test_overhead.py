import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.data import BenchmarkError
from benchmarks.overhead.__main__ import sites_table, sites_targets, study_table, study_targets
from benchmarks.overhead.contenders import Run
from benchmarks.overhead.equal import require_equal_work
from benchmarks.overhead.input import Input, Part, Rows, SiteInput
from benchmarks.overhead.notes import Note, Scored, Trained, note, read_notes
from benchmarks.overhead.ours import notes
from benchmarks.overhead.tree import Cost
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.settings import PROJECT

_COST = Cost(begun=1000.0, ended=1060.0, cpu_seconds=100.0, rss_gb=2.0, pss_gb=1.5, processes=4, other_cpu_seconds=7.0)
# Two sites, one round of two steps: site-1 trains on 3 and site-2 on 5 answer tokens, and all score on 2.
_NOTES: list[Note] = [
    Scored("site-1", 0, 7.65, 2),
    Scored("site-2", 0, 7.65, 2),
    Trained("site-1", 0, 2, 3, begun=1010.0, ended=1040.0),
    Trained("site-2", 0, 2, 5, begun=1012.0, ended=1055.0),
    Scored("site-1", 1, 6.4, 2),
    Scored("site-2", 1, 6.4, 2),
]
_RUN = Run(_COST, _NOTES)


@pytest.fixture
def given(tmp_path: Path) -> Input:
    made = Input(tmp_path)
    sites = [
        SiteInput("site-1", Rows([[1, 2], [1, 2, 3]], prompts=[1, 1]), batches=[[[0], [1]]], rates=[[0.1, 0.1]]),
        SiteInput("site-2", Rows([[1, 2, 3], [1, 2, 3, 4]], prompts=[1, 1]), batches=[[[1], [0]]], rates=[[0.1, 0.1]]),
    ]
    made.write(Part(rounds=1, steps=2, batch_size=1), sites, Rows([[1, 2, 3]], prompts=[1]))
    return made


def _changed(place: int, **changes: object) -> Run:
    """The run with one note changed."""
    changed = list(_NOTES)
    changed[place] = replace(changed[place], **changes)
    return Run(_COST, changed)


def _taking(seconds: float, pss_gb: float = 1.5, site_notes: Sequence[Note] = _NOTES) -> Run:
    return Run(replace(_COST, ended=_COST.begun + seconds, pss_gb=pss_gb), list(site_notes))


def test_input_is_read_as_it_was_written(given):
    assert given.part == Part(rounds=1, steps=2, batch_size=1)
    assert given.sites == ["site-1", "site-2"]
    assert given.site("site-2").batches == [[[1], [0]]]
    assert given.site("site-2").rows.answers(1) == 3
    assert given.validation() == Rows([[1, 2, 3]], prompts=[1])


def test_notes_of_several_processes_are_in_one_file(tmp_path):
    for one in _NOTES:
        note(one, tmp_path / "notes")
    assert read_notes(tmp_path / "notes") == _NOTES


def test_our_points_say_what_was_trained_and_when():
    points = [
        Point("val_loss", 7.65, 0, 0, "site-1", tokens=2, time=1010.0),
        Point("val_loss", 7.65, 0, 0, None, tokens=4, time=1011.0),
        Point("train_loss", 7.6, 1, 8, "site-1", step=1, tokens=1, time=1030.0),
        Point("train_loss", 7.5, 1, 16, "site-1", step=2, tokens=2, time=1040.0),
        Point("train_loss", 7.55, 1, 16, None, tokens=3, time=1041.0),
        Point("val_loss_local", 6.5, 1, 16, "site-1", tokens=2, time=1042.0),
        Point("val_loss", 6.4, 1, 16, "site-1", tokens=2, time=1050.0),
    ]
    assert notes(points) == [_NOTES[0], _NOTES[4], _NOTES[2]]


def test_equal_work_is_equal_but_for_rounding(given):
    runs = {"plain": [_RUN], "flower": [_changed(4, loss=6.43)], "ours": [_RUN, _changed(5, loss=6.37)]}
    require_equal_work(given, runs)


@pytest.mark.parametrize(
    ("name", "run", "message"),
    [
        ("flower", Run(_COST, _NOTES[:3] + _NOTES[4:]), r"flower, site-2, round 0: did None of training.*\(2, 5\)"),
        ("ours", _changed(3, steps=1), r"ours, site-2, round 0: did \(1, 5\) of training, where \(2, 5\)"),
        ("ours", _changed(2, tokens=2), r"ours, site-1, round 0: did \(2, 2\) of training, where \(2, 3\)"),
        ("nvflare", Run(_COST, _NOTES[:-1]), "nvflare, site-2, round 1: did None of validation, where 2"),
        ("nvflare", Run(_COST, [*_NOTES, _NOTES[-1]]), "nvflare, site-2, round 1: Scored 2 times"),
        ("ours", _changed(0, loss=7.66), "ours, site-1: the model after 0 rounds has loss 7.66"),
        ("flower", _changed(4, loss=6.5), "flower, site-1: the model after 1 rounds has loss 6.5"),
        ("ours", _changed(4, loss=6.5), "ours, site-1: the model after 1 rounds has loss 6.5"),
        ("ours", _changed(4, loss=math.nan), "ours, site-1: the model after 1 rounds has loss nan"),
    ],
)
def test_less_or_other_work_names_who_did_it_and_where(given, name, run, message):
    with pytest.raises(BenchmarkError, match=message):
        require_equal_work(given, {"plain": [_RUN], name: [run]})


def test_targets_compare_medians_with_the_better_peer(capsys):
    runs = {
        "ours": [_taking(60), _taking(300), _taking(48)],
        "plain": [_taking(50)] * 3,
        "flower": [_taking(100)] * 3,
        "nvflare": [_taking(80)] * 3,
    }
    assert [str(target) for target in study_targets(runs)] == [
        "overhead_vs_best_peer 0.75 0.75 ok",
        "overhead_vs_plain 1.20 1 short",
        "overhead_fixed_seconds 15.00 12 short",  # 10 before the first step and 5 after the last
        "overhead_pss_gb 1.50 2.5 ok",
    ]
    study_table(runs)
    [ours] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ours")]
    assert ours == ["ours", "60.0", "48.0", "300.0", "100.0", "7.0", "2.00", "1.50", "4", "10.0", "5.0", "6.4000"]


def test_targets_are_those_that_the_contenders_allow():
    names = [target.name for target in study_targets({"ours": [_RUN]})]
    assert names == ["overhead_fixed_seconds", "overhead_pss_gb"]
    assert study_targets({"plain": [_RUN]}) == []


def test_a_sites_share_is_compared_where_it_is_largest(capsys):
    runs = {3: [_taking(30, 0.9)], 10: [_taking(120, 1.5)], 100: [_taking(500, 12.0)]}
    assert [str(target) for target in sites_targets(runs)] == [
        "sites_seconds_growth 1.20 1 short",
        "sites_memory_growth 0.50 1 ok",
    ]
    sites_table(runs)
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        *("100", "500.0", "100.0", "7.0", "12.00", "4"),
        *("5.00", "120.0", "4.85", "114.4"),
    ]


_ORPHAN = """
import os, sys, time
held = bytearray(os.urandom(64 << 20))
while time.process_time() < 0.8:
    pass
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(600)
"""
_PARENT = """
import subprocess, sys, time
from pathlib import Path
# In a session of its own, with another process between, so that it loses its parent.
between = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"
subprocess.run([sys.executable, "-c", between, *sys.argv[1:]], check=True)
while not Path(sys.argv[2]).is_file():
    time.sleep(0.05)
time.sleep(0.6)
"""
_MEASURE = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from benchmarks.overhead import tree
command, log = sys.argv[1:-1], Path(sys.argv[-1])
print(json.dumps(asdict(tree.cost(command, os.environ, log, seconds_to_end=0.5))))
"""


def _measure(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which becomes the parent of orphans."""
    return subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, arguments)], cwd=PROJECT, capture_output=True, text=True, check=False
    )


def test_an_orphan_in_another_session_counts_and_is_ended(tmp_path):
    done = _measure(sys.executable, "-c", _PARENT, _ORPHAN, tmp_path / "pid", tmp_path / "log")
    assert done.returncode == 0, done.stderr
    took = Cost(**json.loads(done.stdout))
    assert took.cpu_seconds > 0.8
    assert took.processes >= 2
    assert 0.064 < took.pss_gb <= took.rss_gb < 0.5
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_command_that_fails_is_quoted(tmp_path):
    done = _measure(sys.executable, "-c", "import sys; sys.exit('no such federation')", tmp_path / "log")
    assert done.returncode == 1
    assert "ended with 1:\nno such federation" in done.stderr
