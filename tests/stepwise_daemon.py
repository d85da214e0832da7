"""The reference daemon, for tests that end it between two steps of a hot swap, as a kernel or a power cut would.

`python -m tests.stepwise_daemon --root DIRECTORY --registry FILE [--break-at STEP] [--kill-at STEP]` serves as
`pybustcall daemon` does, from the same parts, until it comes to a step: at the one its cache is gone, its root being
renamed to DIRECTORY.away; at the other it kills itself.
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

from pybustcall.daemon import DaemonSettings, FilesBackend, Registry, Swaps, create_app
from tests.plain_cache import engine_over


async def main(root: Path, registry: Path, break_at: str, kill_at: str) -> None:
    """Serve until the end that was asked for."""

    def step(name: str) -> None:
        if name == break_at:
            root.rename(f"{root}.away")
        if name == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    engine = engine_over(FilesBackend(root))
    app = create_app(engine, DaemonSettings(), swaps=Swaps(engine, Registry(registry), step=step))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(json.dumps({"url": f"http://127.0.0.1:{runner.addresses[0][1]}"}) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--break-at", default="")
    parser.add_argument("--kill-at", default="")
    asyncio.run(main(**vars(parser.parse_args())))
