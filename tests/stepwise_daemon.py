"""The reference daemon, for tests that end it between two steps of a hot swap or of a bust, as a kernel would.

`python -m tests.stepwise_daemon --root DIRECTORY [--registry FILE] [--journal FILE] [--break-at STEP] [--kill-at STEP]
[--times N]` serves as `pybustcall daemon` does, from the same parts, until it comes to a step: at the one its cache is
gone, its root being renamed to DIRECTORY.away; at the other, for the N-th time, it kills itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from aiohttp import web

from pybustcall.daemon import (
    DaemonSettings,
    Engine,
    FilesBackend,
    Indexes,
    Jobs,
    Journal,
    Layer,
    Registry,
    Swaps,
    create_app,
)


async def main(
    root: Path, registry: Path | None, journal: Path | None, break_at: str, kill_at: str, times: int
) -> None:
    """Serve until the end that was asked for."""

    def step(name: str) -> None:
        nonlocal times
        if name == break_at:
            root.rename(f"{root}.away")
        times -= name == kill_at
        if name == kill_at and times == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    engine = Engine([Layer(name="files", number=0, backend=FilesBackend(root), settle=0)], Indexes(), step=step)
    jobs = Jobs(engine, Journal(journal), step=step)
    app = create_app(engine, DaemonSettings(), swaps=Swaps(engine, Registry(registry), step=step), jobs=jobs)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(json.dumps({"url": f"http://127.0.0.1:{runner.addresses[0][1]}"}) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--break-at", default="")
    parser.add_argument("--kill-at", default="")
    parser.add_argument("--times", type=int, default=1)
    asyncio.run(main(**vars(parser.parse_args())))
