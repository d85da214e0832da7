"""What an answer must be, whatever it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from pybustcall.models import BustReply, BustRequest, JobReply, Problem, cache_key_of, explain
from pybustcall.needs import phrase_of
from pybustcall.testing.conformance.checking import Answer, Model, Unmet
from pybustcall.testing.conformance.probe import ACCEPTED, REPLAYED, TARGET

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "expect",
    "expect_bust",
    "expect_job",
    "expect_one",
    "expect_problem",
    "expect_replay",
    "expect_success",
    "expect_told",
    "reply_of",
]


def expect(answer: Answer, *statuses: int) -> None:
    """Expect one of these statuses."""
    if answer.status not in statuses:
        expected = " or ".join(str(status) for status in statuses)
        raise Unmet(f"answered HTTP {answer.status}, expected {expected}")


def expect_success(answer: Answer) -> None:
    """Expect that a bust is done, or kept as a job."""
    if answer.status != ACCEPTED:
        expect(answer, 200)


def expect_bust(answer: Answer, target: str = TARGET) -> BustReply:
    """Expect the answer to a bust of this target, done or kept as a job."""
    expect_success(answer)
    reply = reply_of(BustReply, answer)
    if reply.accepted != (answer.status == ACCEPTED):
        said = "accepted" if reply.accepted else "done"
        raise Unmet(f"a bust is answered with HTTP {answer.status}, and the answer says that it is {said}")
    if not reply.cache_key.startswith("sha256:"):
        raise Unmet(f"cache_key does not begin with sha256: ({reply.cache_key[:20]!r})")
    if reply.cache_key != cache_key_of(target):
        raise Unmet("cache_key is not the SHA-256 of the target's UTF-8 bytes")
    return reply


def expect_told(answer: Answer, target: str, **fields: object) -> BustReply:
    """Expect the answer to a bust with these fields: it repeats what it must, and tells what was asked for."""
    reply = expect_bust(answer, target)
    asked = BustRequest.model_validate({"target": target, **fields})
    what = phrase_of(asked)
    if name := reply.unechoed(asked):
        told, wanted = getattr(reply, name), getattr(asked, name)
        raise Unmet(f"the answer to {what} tells {name} {told!r}, and {wanted!r} was asked")
    if asked.dry_run and reply.accepted:
        raise Unmet(f"{what} is accepted as a job, and should be answered at once")
    if asked.dry_run and (reply.matched is None or reply.removed):
        raise Unmet(f"{what} tells matched {reply.matched} and removed {reply.removed}")
    if asked.verify and not (asked.dry_run or reply.accepted or reply.verified):
        raise Unmet(f"the answer to {what} does not say verified")
    return reply


def expect_job(answer: Answer, job: str | None) -> JobReply:
    """Expect how that job stands."""
    expect(answer, 200)
    reply = reply_of(JobReply, answer)
    if reply.job != job:
        raise Unmet("asked for a job, it tells of another")
    return reply


def expect_problem(answer: Answer, status: int, name: str) -> None:
    """Expect a refusal that names a field, or something in it."""
    expect(answer, status)
    problem = reply_of(Problem, answer)
    if problem.field is None or problem.field.partition(".")[0] != name:
        raise Unmet(f"the problem names the field {problem.field!r}, not {name!r}")


def expect_replay(first: Answer, again: Answer) -> None:
    """Expect the first answer to a key, and then the same as a repeat."""
    expect_success(first)
    expect_success(again)
    if REPLAYED in first.headers:
        raise Unmet(f"the first answer to a key has {REPLAYED}")
    if again.headers.get(REPLAYED) != "true":
        raise Unmet(f"the answer to a repeat has {REPLAYED} {again.headers.get(REPLAYED)!r}, not 'true'")
    if (again.status, again.body) != (first.status, first.body):
        raise Unmet("the answer to a repeat is another than the first")


def expect_one(answers: Sequence[Answer]) -> None:
    """Expect that one of these answers is the first, and the others repeats of it."""
    for answer in answers:
        expect_success(answer)
    fresh = [answer for answer in answers if REPLAYED not in answer.headers]
    if len(fresh) != 1:
        raise Unmet(f"of {len(answers)} requests with one key at once, {len(fresh)} and not 1 were done anew")
    for answer in answers:
        if answer is not fresh[0]:
            expect_replay(fresh[0], answer)


def reply_of(model: type[Model], answer: Answer) -> Model:
    """Read an answer as what it must be."""
    try:
        return model.model_validate_json(answer.body)
    except ValidationError as error:
        name, why = explain(error)
        raise Unmet(f"{name or 'the body'}: {why}") from error
