"""What users write, for mypy alone: names, argument types and what comes back."""

from __future__ import annotations

from typing import assert_type

import pybustcall
from pybustcall import (
    BustcallClient,
    BustEvent,
    BustJob,
    BustReport,
    BustResult,
    ClientStatistics,
    DaemonCapabilities,
    DaemonStatus,
    Dependency,
    Event,
    EventStream,
    Failback,
    FailedOver,
    FleetView,
    LayerResult,
    NearCache,
    NearCacheStatistics,
    Outbox,
    OutboxCounts,
    Pool,
    ReplayReport,
    Requirements,
    Reset,
    Resolution,
    Retry,
    SemverX,
    SemverXRange,
    Swap,
    SwapResult,
    can_hot_swap,
)
from pybustcall.errors import BustFailed, DeadlineExceeded


async def use() -> None:
    """Use every call once."""
    client = BustcallClient("http://127.0.0.1:8989", peers=["http://10.0.0.2:8989"], retry=None, pool=Pool(total=5))
    BustcallClient(hedge=None, failback=Failback(hold=5), outbox=Outbox(path="outbox.db", rows=10), delivery="all")
    async with client as same:
        assert_type(same, BustcallClient)
        assert_type(await same.bust("cdn/main.css", fault_tolerance=12, timeout=1), BustResult)
        assert_type(await same.bust_many(["a", "b"], on_progress=print), BustReport)
        assert_type(await same.status(), DaemonStatus)
        assert_type(await same.capabilities(daemon="http://10.0.0.2:8989"), DaemonCapabilities)
        assert_type(same.with_options(retry=Retry(attempts=1), delivery="quorum"), BustcallClient)
        assert_type(await same.bust("a", delivery="all", write_ahead=True, idempotency_key="k"), BustResult)
        assert_type(await same.outbox.replay(), ReplayReport)
        assert_type(await same.outbox.counts(), OutboxCounts)
        found = await same.bust("sale", kind="tag", soft=True, namespace="shop", settle=1, reason="price")
        assert_type(found.layers, tuple[LayerResult, ...])
        assert_type((await same.bust("a", kind="prefix", dry_run=True)).matched, int | None)
        assert_type(await same.bust("*", kind="all", confirm=True, allow_wider=False, verify=True), BustResult)
        assert_type(await same.bust_many(["sale"], kind="tag", allow_wider=True), BustReport)
        assert_type(await same.jobs(state="running", limit=10), tuple[BustJob, ...])
        assert_type(await same.job("j1", daemon=found.daemon), BustJob)
        assert_type(await same.wait_job("j1", timeout=60), BustJob)
        assert_type((await same.cancel_job("j1")).is_over, bool)
        assert_type(same.topology(), FleetView)
        assert_type(same.statistics(), ClientStatistics)
        assert_type(await same.supports("cache.hotswap"), bool)
        assert_type(await same.announce("pricing-model", ["2.1.0"]), Dependency)
        assert_type(await same.dependencies(), tuple[Dependency, ...])
        assert_type(await same.forget("pricing-model"), str)
        assert_type(await same.resolve("pricing-model@^2.0.0"), Resolution)
        assert_type(await same.hot_swap([Swap("pricing-model", to="2.2.0", migrate=True)]), SwapResult)
        assert_type(await same.register("products/7.html", depends_on=["pricing-model"], tags=["sale"], ttl=60), str)
        async with same.events(prefix="products/", tags=["sale"]) as events:
            assert_type(events, EventStream)
            async for told in events:
                assert_type(told, BustEvent | Reset)
        cache = same.near_cache(maxsize=1000, ttl=60.0, grace=5, delivery="all", namespace="shop")
        assert_type(cache, NearCache)
        assert_type(await cache.get_or_load("products/7", load, tags=["product:7"]), int)
        assert_type(await cache.get_or_load("products/7", lambda: "plain"), str)
        assert_type(cache.statistics(), NearCacheStatistics)
        assert_type(same.statistics().near, tuple[NearCacheStatistics, ...])
        same.attach(Held(), key=lambda key: f"products/{key}", tags=lambda key: [f"product:{key}"])()
        same.attach(Held(), drop=lambda held, _: held.clear())
        same.on_event(hook)()
        same.reset()
    BustcallClient(requires=Requirements(semverx=">=0.1", capabilities=("cache.hotswap",)))
    assert_type(SemverXRange.parse("^1.0.0").matches(SemverX.parse("1.2.3")), bool)
    if not (verdict := can_hot_swap("1.0.0", "2.0.0")):
        assert_type(verdict.reasons, tuple[str, ...])
    try:
        await client.bust("a")
    except DeadlineExceeded as error:
        assert_type(error.applied, pybustcall.errors.Applied)
    except BustFailed as error:
        assert_type(error.result, BustResult | None)


class Held(dict[int, str]):
    """A cache of the application's own, which can be held weakly."""


async def load() -> int:
    """Load a value."""
    return 7


def hook(event: Event) -> None:
    """Tell one kind of event from the others."""
    match event:
        case FailedOver(hub=hub, reason=reason):
            assert_type((hub, reason), tuple[str, str])
