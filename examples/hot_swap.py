"""Replace the model that cached pages were made with, while they are being served.

Start a daemon on a directory of cached files, with a registry, in a terminal of its own:

    mkdir -p pages && pybustcall daemon --root pages --registry registry.db

Then, in another, with the same directory:

    python examples/hot_swap.py pages

It makes two pages with version 2.1.0 of a pricing model, tells the daemon so, swaps the model to 2.2.0, and shows which
pages went. A second run goes on from 2.2.0. The daemon is looked for as BUSTCALL_URL says, by default at
http://127.0.0.1:8989.
"""

import asyncio
import sys
from pathlib import Path

from pybustcall import BustcallClient, BustcallError, BustRejected, Swap

PRICES = "pricing-model"


def render(pages: Path, name: str, text: str) -> None:
    """Put a page into the cache."""
    (pages / name).write_text(f"{text}\n")


def left(pages: Path) -> list[str]:
    """Tell which pages are there."""
    return sorted(path.name for path in pages.iterdir())


async def main(pages: Path) -> None:
    """Make pages, register them, swap, and look."""
    async with BustcallClient.from_env() as client:
        current = (await client.announce(PRICES, ["2.1.0"])).current  # what is in use, and not the best that is known
        for name in ("shoes.html", "hats.html"):
            render(pages, name, f"made with {PRICES} {current}")
            await client.register(name, depends_on=[PRICES])
        render(pages, "about.html", "made with nothing that changes")
        await client.register("about.html")

        try:
            await client.hot_swap([Swap(PRICES, to="3.0.0-rc.1")])
        except BustRejected as error:
            print("refused, nothing changed:", *error.causes[-1].unmet, sep="\n  ")

        result = await client.hot_swap([Swap(PRICES, to="2.2.0")])
        print(f"{PRICES} {result.swaps[0].from_} -> 2.2.0, {result.busted} pages went")
        print("left:", *left(pages))


def run(arguments: list[str]) -> int:
    """Run it on the directory that is named; tell in a sentence what is wrong, and the exit code."""
    if len(arguments) != 1:
        print("usage: python examples/hot_swap.py DIRECTORY", file=sys.stderr)
        return 2
    pages = Path(arguments[0])
    if not pages.is_dir():
        print(f"{pages} is no directory; name the one that the daemon was given as --root", file=sys.stderr)
        return 2
    try:
        asyncio.run(main(pages))
    except BustcallError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
