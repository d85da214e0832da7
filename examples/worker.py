"""A web worker that keeps prices in its own memory, and drops them as soon as any worker busts them.

Start a daemon that tells everybody of each bust, and as many workers as you like over one database:

    pybustcall daemon --backend memory --journal journal.db
    python examples/worker.py shop.db 8081
    python examples/worker.py shop.db 8082

    curl http://127.0.0.1:8081/products/7       # loaded, and held from then on
    curl http://127.0.0.1:8082/products/7       # each worker has a memory of its own
    curl -X POST http://127.0.0.1:8081/products/7/price -H 'Content-Type: application/json' -d '{"price": "12.50"}'
    curl http://127.0.0.1:8082/products/7       # the new price
    curl http://127.0.0.1:8082/health           # whether what is held is served, and if not, why

With port 0 the system chooses one. Once it listens, the worker tells its URL in one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import shop
from aiohttp import web

from pybustcall import BustcallClient, BustFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GRACE = 1.0  # seconds that prices are served from memory after the daemon was heard last, if its stream breaks
START = 5.0  # seconds that a worker waits for the daemon when it starts; without one it serves from the database


class Worker:
    """The handlers, with what they work on."""

    def __init__(self, database: Path, client: BustcallClient) -> None:
        self._database = database
        self._client = client
        self._prices = client.near_cache(maxsize=10_000, ttl=300.0, grace=GRACE)

    async def product(self, request: web.Request) -> web.Response:
        """Tell a product's price, from memory if it is held."""
        number = int(request.match_info["number"])
        is_loaded = False

        async def load() -> str | None:
            nonlocal is_loaded
            is_loaded = True
            products = await asyncio.to_thread(shop.read_products, self._database, german=False, number=number)
            return products[0][2] if products else None

        price = await self._prices.get_or_load(f"products/{number}", load, tags=[f"product:{number}"])
        if price is None:
            raise web.HTTPNotFound(text="there is no such product\n")
        return web.json_response({"price": price, "source": "loaded" if is_loaded else "held"})

    async def change_price(self, request: web.Request) -> web.Response:
        """Store a new price, then have every worker drop the old one."""
        number = int(request.match_info["number"])
        price = await shop.read_price(request)
        if not await asyncio.to_thread(shop.write_price, self._database, number, price):
            raise web.HTTPNotFound(text="there is no such product\n")
        try:
            result = await self._client.bust(f"product:{number}", kind="tag", reason="a price was changed")
        except BustFailed as error:
            told = {"status": "failed", "error": type(error).__name__, "stage": error.stage, "detail": str(error)}
            return web.json_response({"price": price, "applied": error.applied, **told}, status=503)
        return web.json_response(
            {"price": price, "applied": result.applied, "status": result.status, "stage": result.stage}
        )

    async def health(self, _request: web.Request) -> web.Response:
        """Tell how the near cache stands."""
        return web.json_response(asdict(self._prices.statistics()))

    async def live(self, _app: web.Application) -> AsyncIterator[None]:
        """Have the client live as long as the worker."""
        async with self._client:
            with suppress(TimeoutError):
                await self._prices.wait_trusted(START)
            yield


def create_app(database: Path, client: BustcallClient) -> web.Application:
    """Make a worker. It opens the client's connections with itself and closes them with itself."""
    shop.create_database(database)
    worker = Worker(database, client)
    app = web.Application()
    app.router.add_get(r"/products/{number:\d{1,9}}", worker.product)
    app.router.add_post(r"/products/{number:\d{1,9}}/price", worker.change_price)
    app.router.add_get("/health", worker.health)
    app.cleanup_ctx.append(worker.live)
    return app


async def serve(database: Path, port: int) -> None:
    """Serve until SIGINT or SIGTERM, with the client's settings from BUSTCALL_* variables."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    runner = web.AppRunner(create_app(database, BustcallClient.from_env()), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        print(json.dumps({"url": f"http://127.0.0.1:{runner.addresses[0][1]}"}), flush=True)
        await stopped.wait()
    finally:
        await runner.cleanup()


def main(arguments: list[str]) -> None:
    """Run a worker as the command line says."""
    if len(arguments) != 2 or not arguments[1].isdecimal():
        sys.exit("usage: python examples/worker.py DATABASE PORT")
    asyncio.run(serve(Path(arguments[0]), int(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
