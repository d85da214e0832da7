"""The Rust daemon in `rust/`: how it is built, once for all tests, and started.

It is built outside the checkout, into a directory that is kept, so that only the first run compiles its dependencies:
`CARGO_TARGET_DIR` if that is set, else below the user's cache. `make interop` builds it ahead of the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.interop import PeerProcess, require, start_peer, unavailable

__all__ = ["rust_binary", "rust_tests", "start_rust_daemon"]

_CRATE = Path(__file__).with_name("rust")
_NAME = "bustcall-rust-daemon"
_HINT = "apt install cargo (the Rust daemon needs Rust 1.63 or newer)"
_LINES = 40  # of what cargo says in the end


@cache
def rust_binary() -> Path:
    """Build the Rust daemon if it is not built yet; return its path.

    A machine without cargo, or without the dependencies and a way to get them, skips the test, or fails it in CI;
    what does not compile fails it everywhere.
    """
    _cargo("build", "--release")
    return _target_directory() / "release" / _NAME


def rust_tests() -> str:
    """Run the crate's own tests; return what they said."""
    return _cargo("test", "--release")


def start_rust_daemon(*options: str) -> PeerProcess:
    """Start the Rust daemon on a free port, with these options besides."""
    return start_peer([str(rust_binary()), "--port", "0", *options])


def _cargo(command: str, *options: str) -> str:
    cargo = require("cargo", _HINT)
    _fetch(cargo)
    done = _run(cargo, command, "--locked", "--offline", *options)
    if done.returncode:
        pytest.fail(f"cargo {command} failed:\n{_last_lines(done.stdout)}", pytrace=False)
    return done.stdout


def _fetch(cargo: str) -> None:
    """See that the dependencies are here, those of this platform alone; the network is asked only for what is not."""
    host = re.search(r"^host: (\S+)$", _run(cargo, "-vV").stdout, re.MULTILINE)
    fetch = ("fetch", "--locked", *(("--target", host.group(1)) if host else ()))
    if _run(cargo, *fetch, "--offline").returncode:
        done = _run(cargo, *fetch)
        if done.returncode:
            unavailable(f"cargo cannot get the Rust daemon's dependencies:\n{_last_lines(done.stdout)}")


def _run(cargo: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CARGO_TARGET_DIR": str(_target_directory()), "CARGO_TERM_COLOR": "never"}
    return subprocess.run(
        [cargo, *arguments],
        cwd=_CRATE,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def _target_directory() -> Path:
    if chosen := os.environ.get("CARGO_TARGET_DIR"):
        return Path(chosen).absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "pybustcall" / "interop-rust"


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-_LINES:])


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{rust_binary()}\n")
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        sys.exit(str(missing))
