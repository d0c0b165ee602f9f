"""Freed memory stays with the process while it is trained on, and goes back afterwards."""

import platform
import subprocess
import sys

import pytest

_BLOCK = 40 << 20  # bytes; larger than what malloc ever keeps of its own accord
_PROGRAM = f"""
import resource
from pathlib import Path
from fedsft_assets.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray({_BLOCK}).find(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

plain = faults()
with freed_memory_kept():
    kept, inside = faults(), resident()
print(plain, kept, inside - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to do with freed memory")
def test_freed_memory_is_used_again_without_the_system_and_given_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    plain, kept, returned = map(int, done.stdout.split())
    assert kept < plain / 5
    assert returned > _BLOCK / 2
