"""Bust one key: the smallest script.

Start a daemon on a directory of cached files, in a terminal of its own:

    pybustcall daemon --root some/directory

Then name a file in that directory, such as cdn/main.css:

    python examples/quickstart.py cdn/main.css

The settings come from BUSTCALL_* variables (BUSTCALL_URL, BUSTCALL_PEERS, BUSTCALL_TIMEOUT, ...). Without any, the
daemon is looked for where it listens by default, at http://127.0.0.1:8989.
"""

import asyncio
import sys

from pybustcall import BustcallClient


async def main(key: str) -> None:
    """Bust one key and say what happened."""
    async with BustcallClient.from_env() as client:
        result = await client.bust(key)  # raises, saying what to do, if no daemon acknowledges it
    print(f"{result.status} {key} by {result.daemon}, stage {result.stage}, in {result.elapsed:.3f} s")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) == 2 else sys.exit("usage: python examples/quickstart.py KEY")))
