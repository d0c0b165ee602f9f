"""Rank 0 and those that follow it, as processes that meet in a file."""

import subprocess
import sys
from pathlib import Path

_RANK = """
import os
import sys
import torch.distributed as dist
from fedsft_assets.federation.site.ranks import Followers, Task
from fedsft_assets.model.training.devices.interface import MEETING_FILE
os.environ[MEETING_FILE] = sys.argv[1]
rank = int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
followers = Followers()
if rank == 0:
    for task in (Task("train", 3), Task("evaluate", 4), None):
        followers.tell(task)
else:
    print([tuple(task) for task in followers.tasks()])
followers.part()
print("left" if not dist.is_initialized() else "still there")
"""


_WORD = """
import os
import sys
import time
from fedsft_assets.federation.site.ranks import word_of_rank_0
from fedsft_assets.model.training.devices.interface import MEETING_FILE
os.environ.update({MEETING_FILE: sys.argv[1], "RANK": sys.argv[2], "WORLD_SIZE": "2"})
time.sleep(int(sys.argv[2]))
print(word_of_rank_0("precision", lambda: f"said by {sys.argv[2]}"))
"""


def test_followers_do_what_rank_0_tells_until_nothing_is_left_and_all_leave_their_groups(tmp_path: Path) -> None:
    assert _said(_RANK, tmp_path) == ["left\n", "[('train', 3), ('evaluate', 4)]\nleft\n"]


def test_word_of_rank_0_is_that_of_all_and_is_left_in_no_file(tmp_path: Path) -> None:
    assert _said(_WORD, tmp_path) == ["said by 0\n"] * 2
    assert list(tmp_path.iterdir()) == []


def _said(code: str, folder: Path) -> list[str]:
    """What two ranks print that run the code and meet in the folder."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "meeting"), str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    return said
