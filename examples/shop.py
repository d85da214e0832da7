"""A small shop whose pages are cached as files, and kept fresh by one awaited bust after each change.

The parts are those of many services: a database that holds the truth, a cache that readers are served from, and a
handler that changes the database and then has the old pages dropped. Run it in one terminal:

    python examples/shop.py shop-data

It makes shop-data/shop.db, the cache shop-data/cache, and shop-data/entries.json, which tells a daemon what is made
of what. Then start a daemon on that cache in a second terminal, and be a customer and the owner in a third:

    pybustcall daemon --root shop-data/cache --register shop-data/entries.json

    curl http://127.0.0.1:8080/products/7.html
    curl -X POST http://127.0.0.1:8080/products/7/price -H 'Content-Type: application/json' -d '{"price": "12.50"}'
"""

from __future__ import annotations

import asyncio
import gzip
import html
import json
import os
import re
import sqlite3
import sys
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from pybustcall import BustcallClient, BustFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PRODUCTS = [(7, "Teapot", "Teekanne", "10.00"), (8, "Cup", "Tasse", "4.50"), (9, "Kettle", "Kessel", "25.00")]
FRONT_PAGE = "index.html"


# The database: plain blocking functions, called in a thread.


def create_database(database: Path) -> None:
    """Make the table of products, and fill it if it is empty."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS products (number INTEGER PRIMARY KEY, en TEXT, de TEXT, price TEXT)"
        )
        connection.executemany("INSERT OR IGNORE INTO products VALUES (?, ?, ?, ?)", PRODUCTS)


def read_products(database: Path, *, german: bool, number: int | None = None) -> list[tuple[int, str, str]]:
    """List (number, name, price) of one product, or of all."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute(
            "SELECT number, iif(?, de, en), price FROM products WHERE number = coalesce(?, number) ORDER BY number",
            (german, number),
        )
        return rows.fetchall()


def write_price(database: Path, number: int, price: str) -> bool:
    """Store a price; tell whether there is such a product. It is committed when this returns."""
    with closing(sqlite3.connect(database)) as connection, connection:
        return connection.execute("UPDATE products SET price = ? WHERE number = ?", (price, number)).rowcount == 1


# The names in the cache are the keys that are busted.


def page_name(number: int) -> str:
    """Tell the key of a product's page."""
    return f"products/{number}.html"


def registrations() -> dict[str, list[str]]:
    """Tell what is made of what: the front page shows every price, so it goes when any product's page goes.

    Variants need no registration: the daemon knows that 7.html.gz and 7.html?lang=de are 7.html in other clothes.
    """
    return {FRONT_PAGE: [page_name(number) for number, *_ in PRODUCTS]}


class Shop:
    """The handlers, with what they work on."""

    def __init__(self, database: Path, cache: Path, client: BustcallClient) -> None:
        self._database = database
        self._cache = cache
        self._client = client
        self._changes = 0

    async def front_page(self, request: web.Request) -> web.Response:
        """Show every product with its price."""
        return await self._serve(request, FRONT_PAGE, None)

    async def product(self, request: web.Request) -> web.Response:
        """Show one product."""
        number = int(request.match_info["number"])  # so that 007.html and 7.html are one page, under one key
        return await self._serve(request, page_name(number), number)

    async def change_price(self, request: web.Request) -> web.Response:
        """Store a new price, then have every page that shows the old one dropped."""
        number = int(request.match_info["number"])
        price = await read_price(request)
        # First the truth, then the bust: the other way round, a reader in between would cache the old price again.
        if not await asyncio.to_thread(write_price, self._database, number, price):
            raise web.HTTPNotFound(text="there is no such product\n")
        self._changes += 1
        try:
            result = await self._client.bust(page_name(number))
        except BustFailed as error:
            # The price is stored, but readers may see the old one. Say so; the owner can post the same price again,
            # which does no harm. The detail names daemons: it is for staff, who alone may change prices anyway.
            told = {"status": "failed", "error": type(error).__name__, "stage": error.stage, "detail": str(error)}
            return web.json_response({"price": price, "applied": error.applied, **told}, status=503)
        return web.json_response(
            {
                "price": price,
                "applied": result.applied,
                "status": result.status,
                "stage": result.stage,
                "daemon": result.daemon,
                "seconds": round(result.elapsed, 6),
            }
        )

    async def _serve(self, request: web.Request, page: str, number: int | None) -> web.Response:
        """Answer from the cache if the page is there; otherwise render and store it."""
        # Only variants that we know get a name: a raw query as part of a file's name would let readers fill the disk.
        german = request.query.get("lang") == "de"
        zipped = "gzip" in request.headers.get("Accept-Encoding", "")
        name = page + (".gz" if zipped else "") + ("?lang=de" if german else "")
        try:
            body = await asyncio.to_thread((self._cache / name).read_bytes)
            source = "cached"
        except FileNotFoundError:
            body = await self._render(name, partial(render, self._database, number, german=german, zipped=zipped))
            source = "rendered"
        headers = {
            "Cache-Control": "no-cache",  # browsers ask us each time: nobody can bust what they keep
            "Vary": "Accept-Encoding",
            "X-Page": source,
        }
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, content_type="text/html", charset="utf-8", headers=headers)

    async def _render(self, name: str, make: Callable[[], bytes | None]) -> bytes:
        changes = self._changes
        body = await asyncio.to_thread(make)
        if body is None:
            raise web.HTTPNotFound(text="there is no such product\n")
        path = self._cache / name
        written = await asyncio.to_thread(_write_beside, path, body)
        # A price that changed while we rendered has sent its bust, perhaps ahead of us: storing what we rendered from
        # the old price would keep it for good. So it is shown once, but not stored. Nothing is awaited between this
        # question and the rename. (Several processes would count the changes in the database instead.)
        if changes == self._changes:
            written.replace(path)  # at once and whole: a reader never finds half a page
        else:
            written.unlink()
        return body


def render(database: Path, number: int | None, *, german: bool, zipped: bool) -> bytes | None:
    """Render the page of one product, or of all for None, from the database; None if there is no such product."""
    products = read_products(database, german=german, number=number)
    if not products:
        return None
    items = "\n".join(
        f'<li>{html.escape(name)}: <b id="price-{number}">{price}</b></li>' for number, name, price in products
    )
    title = "Unser Laden" if german else "Our shop"
    page = f"<!doctype html>\n<title>{title}</title>\n<h1>{title}</h1>\n<ul>\n{items}\n</ul>\n".encode()
    return gzip.compress(page) if zipped else page


def _write_beside(path: Path, body: bytes) -> Path:
    """Write to a new hidden file in the same directory, from where a rename takes its place at once."""
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(body)
    return Path(name)


async def read_price(request: web.Request) -> str:
    """Tell the price that a request posts; HTTP 400 if it is none."""
    try:
        price = (await request.json())["price"]
    except (ValueError, TypeError, KeyError):
        price = None
    if not isinstance(price, str) or not re.fullmatch(r"[0-9]{1,7}\.[0-9]{2}", price):
        raise web.HTTPBadRequest(text='the body must be JSON such as {"price": "12.50"}\n')
    return price


def create_app(database: Path, cache: Path, client: BustcallClient) -> web.Application:
    """Make the shop. It opens the client's connections with itself and closes them with itself."""
    create_database(database)
    (cache / "products").mkdir(parents=True, exist_ok=True)
    shop = Shop(database, cache, client)
    app = web.Application()
    app.router.add_get("/", shop.front_page)
    app.router.add_get(r"/products/{number:\d{1,9}}.html", shop.product)
    app.router.add_post(r"/products/{number:\d{1,9}}/price", shop.change_price)

    async def with_client(_app: web.Application) -> AsyncIterator[None]:
        async with client:
            yield  # the shop is open; afterwards the client waits for busts under way, then closes

    app.cleanup_ctx.append(with_client)
    return app


def main(directory: Path) -> None:
    """Open the shop, with everything in `directory` and the client's settings from BUSTCALL_* variables."""
    directory.mkdir(parents=True, exist_ok=True)
    app = create_app(directory / "shop.db", directory / "cache", BustcallClient.from_env())
    (directory / "entries.json").write_text(json.dumps(registrations()))
    web.run_app(app, host="127.0.0.1", port=8080)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) == 2 else sys.exit("usage: python examples/shop.py DIRECTORY")))
