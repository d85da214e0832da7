"""The conformance suite about kinds of busts and jobs: what it decides, and what it cannot."""

from __future__ import annotations

import pytest

from pybustcall.models import LayerReply
from pybustcall.testing import (
    Answer,
    FakeDaemon,
    check_daemon,
)
from pybustcall.testing.conformance import entries, kinds
from tests.bent_daemons import of_jobs
from tests.conforming import (
    ALL,
    APART,
    BUSTS_AGAIN,
    CANCELS,
    CLAIMS,
    DRY_RUN,
    EVERYTHING,
    FIELDS,
    FORGETS_UNUSED,
    IDEMPOTENT,
    JOB_OF_A_KEY,
    JOBS,
    LAYERS,
    LISTS,
    NO_JOB,
    NO_NAMESPACE,
    OF_BUSTS,
    OVER_STAYS,
    PREFIX,
    QUESTIONS,
    REPEATS,
    SETTLES,
    SOFT,
    STANDS,
    TAG,
    UNCONFIRMED,
    VERIFIES,
    Defect,
    Exchange,
    bent,
    deaf_to,
    failed,
    judged,
    named,
    skipped,
)

pytestmark = [pytest.mark.requirement("RES-12"), pytest.mark.requirement("RES-02"), pytest.mark.requirement("INT-04")]


async def test_a_second_bust_that_never_comes_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored between the two is still there, some time after the second was due."""
    monkeypatch.setattr(kinds, "LATE", 1.0)
    async with bent(deaf_to("settle")) as url:
        verdict = await judged(BUSTS_AGAIN, url)
    assert verdict.outcome == "failed"
    assert verdict.detail == "what was stored before the second bust was due is still there 1 s after it"


async def test_a_daemon_too_slow_to_store_anything_before_the_second_bust_is_not_judged_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A longer time is tried, up to what a check may take."""
    monkeypatch.setattr(kinds, "_SETTLE", 1e-9)
    monkeypatch.setattr(kinds, "LATE", 3e-9)
    async with FakeDaemon(capabilities=EVERYTHING[1:]) as fake:
        verdict = await judged(BUSTS_AGAIN, fake.url)
        assert len([bust for bust in fake.applied if bust.settle]) == 2
    assert (verdict.outcome, verdict.detail) == ("skipped", "not decided: two requests take it more than 3e-09 s")


async def test_a_job_that_does_not_end_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be reached is like that, and no fault of the daemon's."""
    monkeypatch.setattr(entries, "LATE", 0.05)
    async with FakeDaemon([Answer.accepted()] * 5, capabilities=EVERYTHING[1:]) as fake:
        verdict = await judged(VERIFIES, fake.url)
    assert (verdict.outcome, verdict.detail) == ("skipped", "not decided: a job is still running after 0.05 s")


async def test_jobs_of_a_daemon_that_advertises_none_are_a_fault() -> None:
    """A client could not ask for them, and takes such an answer for none."""
    without_jobs = set(EVERYTHING) - {JOBS}
    async with FakeDaemon([Answer.accepted()], capabilities=without_jobs - {"cache.bust"}) as fake:
        verdict = await judged(VERIFIES, fake.url, without_jobs)
    assert (verdict.outcome, verdict.detail) == (
        "failed",
        "a bust is answered with HTTP 202, which takes cache.bust.jobs",
    )


async def test_a_layer_of_a_job_that_failed_says_why() -> None:
    """That it failed is no fault; that nobody is told is one."""
    for error, outcome in (("away", "passed"), (None, "failed")):
        layers = [LayerReply(name="redis", ok=False, error=error)]
        async with FakeDaemon([Answer.accepted(layers=layers)], capabilities=[JOBS]) as fake:
            assert (await judged(LAYERS, fake.url)).outcome == outcome


async def test_where_no_job_is_named_nothing_is_said_of_jobs() -> None:
    """A daemon may do everything at once, and tell jobs of others."""

    def at_once(exchange: Exchange) -> None:
        if exchange.asks():
            exchange.status = 200
            exchange.say(status="success", job=None)

    async with bent(at_once) as url:
        for name in (STANDS, LISTS, CANCELS, OVER_STAYS, JOB_OF_A_KEY):
            verdict = await judged(name, url)
            assert (verdict.outcome, verdict.detail) == (
                "skipped", "not decided: it names no job in its answers to busts",
            )  # fmt: skip
        for name in (QUESTIONS, NO_JOB):
            assert (await judged(name, url)).outcome == "passed"


async def test_jobs_are_asked_for_in_a_strategy_that_the_daemon_knows() -> None:
    """Hybrid only if it is said to be supported."""
    for document, advertises in ((True, {"supported_strategies": ["direct", "dimensional"]}), (False, {})):
        async with FakeDaemon(capabilities=[JOBS], document=document, advertises=advertises) as fake:
            assert (await judged(LISTS, fake.url)).outcome == "skipped"
            assert {bust.strategy for bust in fake.requests} == {"dimensional"}


async def test_a_job_that_is_not_done_for_long_is_not_judged_by_its_cancelling() -> None:
    """It may be settling, since nobody can say when that ends."""
    async with bent(of_jobs(state="settling", ended=None)) as url:
        verdict = await judged(OVER_STAYS, url)
    assert (verdict.outcome, verdict.detail) == ("skipped", "not decided: the job is settling")


async def test_a_cache_in_which_nothing_is_held_is_judged_by_its_words_alone() -> None:
    """What it says of its busts is true of an empty one; a wrong number is not."""

    def empty(exchange: Exchange) -> None:
        if exchange.asks():
            counts = {name: 0 for name in ("removed", "matched") if name in exchange.said}
            exchange.say(**counts, layers=[])

    async with bent(empty) as url:
        for name in (ALL, PREFIX, TAG, SOFT, APART, DRY_RUN, BUSTS_AGAIN):
            verdict = await judged(name, url)
            assert (verdict.outcome, verdict.detail.startswith("not decided: ")) == ("skipped", True), verdict
        for name in (UNCONFIRMED, FIELDS, NO_NAMESPACE):
            assert (await judged(name, url)).outcome == "passed"


async def test_keys_that_a_cache_cannot_hold_are_left_out() -> None:
    """A prefix is judged by the others."""

    def without(marks: str) -> Defect:
        def defect(exchange: Exchange) -> None:
            if exchange.is_("POST", "entries") and any(mark in exchange.sent["key"] for mark in marks):
                exchange.status = 422
                exchange.fake.entries.pop(exchange.sent["key"])

        return defect

    async with bent(without("?*")) as url:
        assert (await judged(PREFIX, url)).outcome == "passed"
        assert (await judged(TAG, url)).outcome == "passed"
    async with bent(without("/")) as url:
        assert (await judged(TAG, url)).detail == "answered HTTP 422, expected 200"
        assert FORGETS_UNUSED in failed(await check_daemon(url))


async def test_without_registrations_the_kinds_are_judged_by_their_answers() -> None:
    """What is repeated, refused and told of jobs; not what goes."""
    async with FakeDaemon(capabilities=[*OF_BUSTS, JOBS, IDEMPOTENT], layers=["fake"]) as fake:
        verdicts = await check_daemon(fake.url)
    assert failed(verdicts) == {}
    assert all("cache.register" in named(name).needs for name in (ALL, PREFIX, TAG, SOFT, APART, DRY_RUN, BUSTS_AGAIN))
    for name in (REPEATS, CLAIMS, FIELDS, NO_NAMESPACE, UNCONFIRMED, VERIFIES, SETTLES, STANDS, JOB_OF_A_KEY):
        assert name not in skipped(verdicts)


@pytest.mark.parametrize("kinds", [["cache.bust.tag"], ["cache.bust.prefix", "cache.bust.soft"]])
async def test_a_daemon_with_some_kinds_refuses_the_others(kinds: list[str]) -> None:
    """It knows the field, so that it can; one that takes them for keys does not pass."""
    async with FakeDaemon(capabilities=kinds) as fake:
        assert (await judged(CLAIMS, fake.url, kinds)).outcome == "passed"
        for advertised in (kinds, ["cache.bust.soft"]):
            assert (await judged(FIELDS, fake.url, advertised)).outcome == "passed"
    async with FakeDaemon(capabilities=["cache.bust.namespace"]) as fake:
        verdict = await judged(CLAIMS, fake.url, kinds)
    assert verdict.outcome == "failed"
    assert verdict.detail.endswith(", which it does not advertise, for a key; it must refuse it")


async def test_a_daemon_that_does_what_it_does_not_advertise_does_not_pass() -> None:
    """A kind, or a field: clients go by the document."""
    async with FakeDaemon(capabilities=EVERYTHING[1:]) as fake:
        verdict = await judged(CLAIMS, fake.url, ["cache.bust", "cache.bust.soft"])
        assert verdict.detail == "it says that it did a bust of the kind prefix, which it does not advertise"
        verdict = await judged(CLAIMS, fake.url, set(EVERYTHING) - {"cache.bust.soft"})
        assert verdict.detail == "it says that it kept to soft, which it does not advertise"


async def test_nobody_elses_entries_are_removed_by_a_bust_of_everything() -> None:
    """It is tried in a namespace of its own, or as a dry run, or not at all."""
    for kept in ({"cache.bust.namespace", "cache.bust.dry_run"}, {"cache.bust.dry_run"}, set[str]()):
        capabilities = {"cache.register", "cache.bust.all", *kept}
        async with FakeDaemon(capabilities=capabilities) as fake:
            fake.entries["of/others"] = ()
            assert failed(await check_daemon(fake.url, strict=True)) == {}
            assert "of/others" in fake.entries
