"""What importing transformers leaves out, and what it leaves as it was."""

import subprocess
import sys

_CODE = """
import functools, sys
before = functools.lru_cache
import fedsft_assets.model.training.packed_attention
assert functools.lru_cache is before
assert sys.modules.get("scipy", "absent") == "absent"
from transformers.utils.import_utils import create_import_structure_from_path as structure
import transformers.models
print(*structure.cache_info())
"""


def test_source_of_each_model_of_transformers_is_looked_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    _hits, misses, most, kept = done.stdout.split()
    assert most == "None"
    assert int(kept) > 128
    assert int(misses) == int(kept)
