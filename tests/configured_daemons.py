"""Real daemons that a configuration file describes, each a process of its own, one after the other over the same files.

How a process is started otherwise (its file systems, its clock) is for the test to say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, final

from tests.conftest import PATIENCE, DaemonProcess

__all__ = ["REDIS_AND_PAGES", "ConfiguredDaemons"]

_COMMAND: Final = (sys.executable, "-m", "pybustcall", "daemon", "--json", "--config")

REDIS_AND_PAGES: Final = """
[[layers]]
name = "redis"
number = 0
backend = "redis"
url = "{redis}"
timeout = 0.5

[[layers]]
name = "pages"
number = 1
backend = "files"
root = "pages"
settle = 0.0
"""
"""The layers of a usual web application: Redis at a URL to be filled in, and the files of the fixture `pages`."""


@final
class ConfiguredDaemons:
    """Daemons with one configuration, which is written to `directory`, and so is what they log.

    - `wrapped`: makes of the daemon's command the one that is run
    - `env`: what differs from the environment of the tests
    """

    def __init__(
        self,
        directory: Path,
        configuration: str,
        *,
        wrapped: Callable[[list[str]], list[str]] = list,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self._settings = directory / "bustcall.toml"
        self._settings.write_text(configuration, encoding="utf-8")
        self._wrapped = wrapped
        self._env = env or {}
        self._running: list[DaemonProcess] = []

    @property
    def log(self) -> str:
        """What they have logged."""
        return (self._directory / "daemon.log").read_text(encoding="utf-8", errors="replace")

    def start(self, port: int = 0) -> DaemonProcess:
        """Start one, and wait until it listens, at a free port if it is 0."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
        with (self._directory / "daemon.log").open("ab") as log:
            process = subprocess.Popen(
                self._wrapped([*_COMMAND, str(self._settings), "--port", str(port)]),
                stdout=subprocess.PIPE,
                stderr=log,
                env={**inherited, **self._env},
            )
        daemon = DaemonProcess(process, "", self._directory)
        self._running.append(daemon)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the daemon ended with {process.wait(PATIENCE)} before it listened:\n{self.log}"
        daemon.url = json.loads(line)["url"]
        return daemon

    def close(self) -> None:
        """End all."""
        for daemon in self._running:
            daemon.kill()
            assert daemon.process.stdout is not None
            daemon.process.stdout.close()
