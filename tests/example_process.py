"""Examples as processes of their own, as a reader runs them: to their end, or until a signal after a certain line.

What an example leaves behind is told, and then taken away; whether it may is for the test to say. Each is run where
settings of another daemon are in the environment, which no example may take for its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from tests.conftest import PATIENCE

__all__ = ["EXAMPLES", "Ended", "end_group", "group_is_empty", "run_example"]

EXAMPLES: Final = Path(__file__).parent.parent / "examples"

_OF_ANOTHER_DAEMON: Final = {"BUSTCALL_TOKEN": "of-another-daemon", "BUSTCALL_URL": "http://127.0.0.1:1"}


def group_is_empty(leader: int) -> bool:
    """Tell whether no process is left of those that the leader of a session started."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


def end_group(leader: int) -> None:
    """Kill whatever is left of those that the leader of a session started."""
    if not group_is_empty(leader):
        os.killpg(leader, signal.SIGKILL)


@final
@dataclass(frozen=True)
class Ended:
    """An example that has ended, and what it left behind."""

    code: int
    output: str
    errors: str
    left_files: list[Path]
    left_processes: bool


async def run_example(
    name: str,
    directory: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    stop_at: str = "",
    number: signal.Signals = signal.SIGINT,
) -> Ended:
    """Run the example `name`.py with its temporary files in `directory`, and wait until it has ended.

    - `env`: what differs from the environment of the tests
    - `stop_at`: the signal `number` is sent once it has printed a line that begins so
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLES / f"{name}.py"), *arguments),
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "TMPDIR": str(directory), **_OF_ANOTHER_DAEMON, **(env or {})},
        start_new_session=True,
    )
    assert process.stdout is not None
    output = b""
    try:
        async with asyncio.timeout(6 * PATIENCE):
            while stop_at:
                output += (line := await process.stdout.readline())
                assert line, f"it ended before it said {stop_at!r}:\n{output.decode()}"
                if line.startswith(stop_at.encode()):
                    process.send_signal(number)
                    break
            rest, errors = await process.communicate()
        left = not group_is_empty(process.pid)
    finally:
        if not group_is_empty(process.pid):
            end_group(process.pid)
            await process.communicate()
    left_files = await asyncio.to_thread(lambda: list(directory.iterdir()))
    return Ended(await process.wait(), (output + rest).decode(), errors.decode(), left_files, left)
