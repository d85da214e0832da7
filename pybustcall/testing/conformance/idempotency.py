"""Idempotency keys: what comes again is done once."""

from __future__ import annotations

from typing import Final

from pybustcall.testing.conformance.checking import IDEMPOTENT, Check, Unmet
from pybustcall.testing.conformance.expecting import expect, expect_one, expect_problem, expect_replay, expect_success
from pybustcall.testing.conformance.probe import ACCEPTED, BUST, KEY, REPLAYED, ROUNDS, TARGET, Probe, new_key

__all__ = ["CHECKS"]


async def _answers_a_repeat_from_memory(probe: Probe) -> None:
    key = new_key()
    first = await probe.bust_once(key, target=TARGET, strategy="direct")
    again = await probe.bust_once(key, target=TARGET, strategy="direct")
    expect_replay(first, again)


async def _applies_once_what_comes_at_once(probe: Probe) -> None:
    for _ in range(ROUNDS):
        expect_one(await probe.post_at_once(BUST, {"target": TARGET, "strategy": "direct"}, new_key()))


async def _refuses_a_key_of_another_request(probe: Probe) -> None:
    key = new_key()
    expect_success(await probe.bust_once(key, target=TARGET, strategy="direct"))
    for fields in ({"target": f"{TARGET}.map", "strategy": "direct"}, {"target": TARGET, "strategy": "dimensional"}):
        answer = await probe.bust_once(key, **fields)
        expect_problem(answer, 422, KEY)


async def _refuses_what_is_no_key(probe: Probe) -> None:
    for key in ("x" * 256, "two words"):
        answer = await probe.bust_once(key, target=TARGET)
        expect_problem(answer, 400, KEY)


async def _remembers_no_refusal(probe: Probe) -> None:
    for refused in ({"target": ""}, {"target": TARGET, "strategy": "no-such-strategy"}):
        key = new_key()
        first = await probe.bust_once(key, **refused)
        if first.status in {200, ACCEPTED}:  # a daemon may take any strategy
            continue
        expect(first, 400, 422)
        answer = await probe.bust_once(key, target=TARGET)
        expect_success(answer)
        if REPLAYED in answer.headers:
            raise Unmet(f"the first success of a key has {REPLAYED}")


CHECKS: Final[tuple[Check, ...]] = (
    Check("answers a repeat of a key from memory", _answers_a_repeat_from_memory, needs=(IDEMPOTENT,)),
    Check(
        "applies once what comes with a key many times at once", _applies_once_what_comes_at_once, needs=(IDEMPOTENT,)
    ),
    Check("refuses a key that belongs to another request", _refuses_a_key_of_another_request, needs=(IDEMPOTENT,)),
    Check("refuses what cannot be a key", _refuses_what_is_no_key, needs=(IDEMPOTENT,)),
    Check("remembers no refusal under a key", _remembers_no_refusal, needs=(IDEMPOTENT,)),
)
