"""The example of near caches as a reader runs it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.example_process import run_example


async def test_everything_comes_as_expected(tmp_path: Path) -> None:
    """It ends with 0, tells of a late fill that was refused, and leaves nothing behind."""
    ended = await run_example("near_cache", tmp_path)
    assert (ended.code, ended.errors) == (0, ""), ended.output
    assert "expected" not in ended.output
    assert re.search(r"refused=1, .*trusted=True", ended.output)
    assert (ended.left_files, ended.left_processes) == ([], False)
