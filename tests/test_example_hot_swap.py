"""The example of a hot swap, where it cannot be played: what is wrong is told in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE

EXAMPLE = Path(__file__).parent.parent / "examples" / "hot_swap.py"


def run(*arguments: str) -> tuple[int, str, str]:
    """Run it where no daemon listens; tell exit code, standard output, standard error."""
    env = {**os.environ, "BUSTCALL_URL": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [(), ("a", "b")])
def test_without_one_directory_it_tells_how_it_is_called(arguments: tuple[str, ...]) -> None:
    """Exit code 2."""
    assert run(*arguments) == (2, "", "usage: python examples/hot_swap.py DIRECTORY\n")


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    """Exit code 2, also where the name is a file's; nothing is made."""
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.touch()
    for path in (missing, file):
        told = f"{path} is no directory; name the one that the daemon was given as --root\n"
        assert run(str(path)) == (2, "", told)
    assert not missing.exists()


def test_a_daemon_that_is_not_there_is_told(tmp_path: Path) -> None:
    """Exit code 1, and what to do."""
    code, out, err = run(str(tmp_path))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("announcing pricing-model failed ")
    assert "Check that a daemon runs there" in err
