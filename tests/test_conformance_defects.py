"""The conformance suite tells a daemon that has one defect, whatever it is."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from pybustcall.models import cache_key_of
from pybustcall.testing import (
    CHECKS,
    Answer,
    FakeDaemon,
    check_daemon,
)
from pybustcall.testing.conformance import reader
from tests.bent_daemons import (
    RemembersRefusals,
    TellsWhatWasMissed,
    accepting,
    accepts_by_words_alone,
    always_unchanged,
    answering,
    back_by,
    begins_alike,
    blaming,
    bust_at,
    busting,
    busts_everything,
    busts_in_a_dry_run,
    busts_no_dependents,
    busts_one_dependent,
    cancels_nothing,
    cancels_what_is_over,
    careless,
    conflicting,
    counts_for_each,
    counts_what_is_gone,
    dating,
    deaf_to_the_query,
    denies_its_status,
    dropping,
    empties_everything,
    fails_in_a_layer,
    follows_what_it_refused,
    forgets_everything,
    forgets_its_tag,
    forgets_nothing,
    forgets_one,
    forgets_the_default_namespace,
    forgets_the_namespace,
    forgets_what_is_in_use,
    goes_over,
    going_on,
    has_no_such_route,
    in_place_of,
    is_no_job,
    keeps_dry_runs,
    keeps_what_it_refused,
    knows_every_job,
    listing,
    makes_a_job_of_each_repeat,
    misses_what_is_forgotten,
    numbered,
    of_interest,
    of_jobs,
    older_and_broken,
    other_document,
    plain_words,
    remembers_targets_alone,
    removes_in_a_dry_run,
    removes_soft,
    removes_what_it_refused,
    renames,
    replays_at_once,
    resets_to_the_beginning,
    retelling,
    revives,
    saying,
    stays_behind,
    swaps_again,
    swaps_nothing,
    swaps_the_first,
    takes_any_question,
    tells_from_before,
    tells_the_second_first,
    too_large,
    unfiltered,
    unsorted,
    wants,
    wants_any_token,
    weak_tags,
    without,
    wrong_version,
)
from tests.conforming import (
    ACCESS,
    ALL,
    ALSO,
    APART,
    AS_ASKED,
    BUST_DEPENDENTS,
    BUSTS_AGAIN,
    BY_PREFIX,
    BY_TAG,
    CANCELS,
    CLAIMS,
    COMES_BACK,
    CONNECTIONS,
    DEPENDENTS,
    DRY_RUN,
    EVERYTHING,
    FIELDS,
    FITS,
    FORGETS,
    FORGETS_UNUSED,
    HEAD,
    HEARTBEAT,
    IDEMPOTENT,
    IN_ORDER,
    JOB_OF_A_KEY,
    KEY_OF_ANOTHER_KIND,
    LAYERS,
    LISTS,
    NO_JOB,
    NO_NAMESPACE,
    OF_BUSTS,
    OF_DOCUMENTS,
    OF_EVENTS,
    OF_KEYS,
    ONCE,
    OVER_STAYS,
    PIECES,
    PREFIX,
    QUESTIONS,
    REPEATS,
    RESETS,
    SETTLES,
    SOFT,
    STANDS,
    STEP,
    STREAM,
    SWAPS_ONCE,
    TAG,
    TELLS,
    TELLS_NO_DRY_RUN,
    THE_END,
    TOLD_APART,
    UNCONFIRMED,
    VERIFIES,
    Defect,
    Exchange,
    Heard,
    Telling,
    bent,
    deaf_to,
    failed,
    hearing,
    in_memory,
    judged,
    named,
    serving_events,
    silent,
    skipped,
)
from tests.conftest import PATIENCE

pytestmark = [pytest.mark.requirement("RES-12"), pytest.mark.requirement("RES-02"), pytest.mark.requirement("INT-04")]

OF_STREAMS: list[tuple[str, Telling, str]] = [
    (TELLS, serving_events(404, "application/json"), "answered HTTP 404, expected 200"),
    (TELLS, serving_events(content_type="text/plain"), "its events are text/plain, not text/event-stream"),
    (TELLS, retelling("live", heartbeat=None), "an event live cannot be read: heartbeat: Field required"),
    (TELLS, retelling("live", heartbeat=0), "the heartbeat that it says is 0 s"),
    (TELLS, retelling("bust", kind=None), "an event bust cannot be read: kind: Field required"),
    (TELLS, Telling(tells_from_before), "a stream that goes on from no id begins with bust, not with live"),
    (TELLS, silent(lambda heard: heard.name == "bust"), "says nothing more before a bust is told that was answered"),
    (TELLS, silent(lambda heard: heard.name == "live"), "says nothing more before it is live"),
    (TELLS, in_place_of("bust", THE_END), "it ends a stream of events whose reader is there"),
    (TELLS, in_place_of("bust", b"data: \xff\n\n"), "its stream of events is none: it has text that is not UTF-8"),
    (
        TELLS,
        in_place_of("live", b"event: live\ndata: {}\n\n"),
        "an event live has the id '', which is not EPOCH-NUMBER",
    ),
    (TELLS, in_place_of("live", b"event: live\ndata: {}\nid: 7\n\n"), "an event live has the id '7', which is not"),
    (IN_ORDER, dating(lambda number: 100.0 - number), "its dates go back"),
    (IN_ORDER, dating(lambda number: 1000.0 * number), "000 s in 0 s"),
    (IN_ORDER, numbered(lambda _: 1000), "the number of an event is 1000 after 1000; numbers must rise"),
    (IN_ORDER, numbered(lambda number: 1000 - number), "the number of an event is 998 after 999; numbers must rise"),
    (IN_ORDER, Telling(goes_over), "its events go over to another epoch, and it does not say reset"),
    (IN_ORDER, Telling(tells_the_second_first), "five busts, one after another, are told in another order, or not all"),
    (
        IN_ORDER,
        silent(lambda heard: heard.name == "bust" and heard.said["target"].endswith("/1")),
        "five busts, one after another, are told in another order, or not all",
    ),
    (IN_ORDER, counts_for_each(), "two readers are told of a bust under other ids"),
    (AS_ASKED, retelling("bust", kind="key"), "an event tells kind 'key', and 'prefix' was asked"),
    (AS_ASKED, retelling("bust", soft=None), "an event tells soft 'False', and 'True' was asked"),
    (AS_ASKED, retelling("bust", strategy="direct"), "an event tells strategy 'direct', and 'dimensional' was asked"),
    (AS_ASKED, retelling("bust", namespace="default"), "an event tells namespace 'default', and 'conformance-"),
    (COMES_BACK, going_on(lambda _: None), "is told 0 of 3 events that were missed before it is live"),
    (COMES_BACK, Telling(forgets_one), "is told 2 of 3 events that were missed before it is live"),
    (COMES_BACK, back_by(1), "is told 4 of 3 events that were missed before it is live"),
    (COMES_BACK, going_on(lambda _: "x"), "it has a reader forget everything who has missed little or nothing"),
    (COMES_BACK, back_by(1, streams=-1), "is told 4 of 3 events that were missed before it is live"),
    (RESETS, going_on(lambda _: None), "after an id of another epoch: a stream begins with live, not with reset"),
    (
        RESETS,
        going_on(lambda after: after if len(after) < 32 else None),
        "after an id that was never given: a stream begins with live, not with reset",
    ),
    (
        RESETS,
        going_on(lambda after: after if "-" in after else None),
        "after an id that is none: a stream begins with live, not with reset",
    ),
    (
        RESETS,
        going_on(lambda after: after.removesuffix("x")),
        "after an id with a number that is none: a stream begins with bust, not with reset",
    ),
    (RESETS, retelling("reset", reason=None), "an event reset cannot be read: reason: Field required"),
    (RESETS, TellsWhatWasMissed(after=False).telling(), "after an id of another epoch a reset tells what was busted"),
    (RESETS, TellsWhatWasMissed(after=True).telling(), "after an id of another epoch a reset tells what was busted"),
    (RESETS, Telling(resets_to_the_beginning), "a reset has another id than the newest event"),
    (BY_PREFIX, unfiltered("prefix"), "who wants prefix a, prefix z/ is told of a direct bust of the key ab"),
    (
        BY_PREFIX,
        unfiltered("prefix", instead=lambda heard: wants(heard, begins_alike)),
        "who wants prefix a, prefix z/ is told of a direct bust of the key ab",
    ),
    (
        BY_PREFIX,
        unfiltered("prefix", instead=lambda heard: wants(heard, str.__eq__)),
        "who wants prefix a, prefix z/ is not told of a direct bust of the key a/",
    ),
    (
        BY_PREFIX,
        silent(lambda heard: heard.name == "bust" and not wants(heard, lambda prefix, key: key.startswith(prefix))),
        "who wants prefix a, prefix z/ is not told of a direct bust of the prefix above",
    ),
    (
        BY_PREFIX,
        silent(lambda heard: heard.name == "bust" and heard.said["strategy"] == "dimensional"),
        "b.css.gz, prefix c.css.gz, prefix d.css?v=1 is not told of a dimensional bust of the key a.css",
    ),
    (
        BY_PREFIX,
        unfiltered("prefix", instead=lambda heard: of_interest(heard, strategy="dimensional")),
        "prefix d.css?v=1 is told of a direct bust of the key c.css",
    ),
    (
        BY_PREFIX,
        unfiltered("prefix", instead=lambda heard: of_interest(heard, kind=heard.said["kind"].replace("tag", "key"))),
        "who wants prefix a, prefix z/ is told of a direct bust of the tag a/c",
    ),
    (BY_TAG, unfiltered("tag", "prefix"), "tag u, prefix p is told of a direct bust of the tag t/a"),
    (BY_TAG, unfiltered("tag"), "who wants tag t, tag u, prefix p is not told of a direct bust of the tag t"),
    (
        BY_TAG,
        silent(lambda heard: "tag" not in heard.query and heard.said.get("kind") == "tag"),
        "the bust of a tag is not told to who wants the prefix of an entry with it",
    ),
    (
        BY_TAG,
        silent(lambda heard: heard.name == "bust" and "tag" in heard.query and not of_interest(heard)),
        "the bust of a registered entry is not told to who wants its tag",
    ),
    (TOLD_APART, unfiltered("namespace"), "a reader of one namespace is told what was busted in another, or not what"),
    (TELLS_NO_DRY_RUN, busts_in_a_dry_run(), "a dry run, which removes nothing, is told as a bust"),
    (ALSO, retelling("bust", also=None), "also does not name an entry that depends on what was busted"),
    (
        ALSO,
        Telling(lambda heard: [heard.saying(also=None) if heard.said.get("kind") == "tag" else heard]),
        "also does not name an entry that has the tag that was busted",
    ),
    (HEARTBEAT, silent(lambda heard: not heard.name), "a stream says nothing for 1.2 s; every 0.1 s it must say the"),
    (HEARTBEAT, Telling(stays_behind), "a stream says what it said; every 0.1 s it must say the newest id"),
    *(
        (
            ACCESS,
            Telling(say=answering("GET", "capabilities", access={STREAM: tier})),
            f"events.stream is told to be {tier}, and answers no token with HTTP 200",
        )
        for tier in ("protected", "private")
    ),
]
DEFECTS: list[tuple[str, Defect, str]] = [
    (
        "busts targets of any script, written out or escaped",
        busting(lambda target: "キー" in target, cache_key=cache_key_of("?")),
        "cache_key is not the SHA-256",
    ),
    ("reads a target of 8192 bytes", too_large, "answered HTTP 413, expected 200 or 422"),
    (
        "reads a target of 8192 bytes",
        busting(lambda target: len(target) > 4000, cache_key=cache_key_of("?")),
        "cache_key is not the SHA-256",
    ),
    ("reports no fault stage beyond the scale", answering("POST", "bust", fault_stage=13), "fault_stage is 13"),
    (
        "names the field at fault in an RFC 9457 problem",
        plain_words,
        "a refusal is text/plain, not ",
    ),
    ("tells its capabilities on one of the two routes", older_and_broken, "the map of bindings is not one: "),
    (
        "has a sound capability document",
        answering("GET", "capabilities", capabilities=["daemon.status"]),
        "does not name cache.bust",
    ),
    ("has a sound capability document", answering("GET", "capabilities", semverx="1.0"), "semverx: version '1.0'"),
    (
        "has a sound capability document",
        answering("GET", "capabilities", requires={"semverx": "new"}),
        "requires.semverx: range 'new'",
    ),
    ("has a sound capability document", answering("GET", "capabilities", binding=7), "binding: Input should be"),
    ("has a sound capability document", answering("GET", "capabilities", 500), "answered HTTP 500, expected 200"),
    ("tells by its ETag that its document is unchanged", weak_tags, "its ETag is W/"),
    ("tells by its ETag that its document is unchanged", forgets_its_tag, "answered HTTP 200, expected 304"),
    ("tells by its ETag that its document is unchanged", without("ETag", 304), "or another ETag"),
    ("tells by its ETag that its document is unchanged", always_unchanged, "answered HTTP 304, expected 200"),
    *(
        (
            "signs every answer with the digest of its document",
            without("Bustcall-Capabilities", status),
            f"Bustcall-Capabilities of an HTTP {status} ",
        )
        for status in (200, 304, 400, 404, 405, 415, 422)
    ),
    ("tells the access of each capability", answering("GET", "capabilities", access={}), "does not name cache.bust"),
    (
        FITS,
        answering("GET", "capabilities", requires={"semverx": ">=99", "capabilities": ["cache.telepathy"]}),
        "does not match >=99; capability cache.telepathy is missing",
    ),
    (FITS, answering("GET", "capabilities", requires={"semverx": "new"}), "cannot be read: range 'new'"),
    *(
        (
            ACCESS,
            answering("GET", "capabilities", access={name: tier}),
            f"{name} is told to be {tier}, and answers no token with HTTP ",
        )
        for name in (*EVERYTHING, "daemon.status", "daemon.capabilities")
        if name not in {IDEMPOTENT, *OF_BUSTS}
        for tier in ("protected", "private")
    ),
    (ACCESS, wants_any_token, "cache.bust is told to be protected, and answers a wrong token with HTTP 200"),
    (ACCESS, denies_its_status, "daemon.status is told to be public, and answers no token with HTTP 401"),
    (ONCE, answering("POST", "bust", 500), "answered HTTP 500, expected 200"),
    (ONCE, without("Idempotency-Replayed", 200), "of 8 requests with one key at once, 8 and not 1 were done anew"),
    (SWAPS_ONCE, replays_at_once, "of 8 requests with one key at once, 0 and not 1 were done anew"),
    (SWAPS_ONCE, swaps_nothing, "the current version is 1.0.0, and should be 1.1.0"),
    (
        KEY_OF_ANOTHER_KIND,
        remembers_targets_alone,
        "of a plain bust with another kind: answered HTTP 200, expected 422",
    ),
    (KEY_OF_ANOTHER_KIND, deaf_to("kind"), "with another kind: answered HTTP 200, expected 422"),
    (KEY_OF_ANOTHER_KIND, deaf_to("soft", echoes=True), "with another soft: answered HTTP 200, expected 422"),
    (KEY_OF_ANOTHER_KIND, deaf_to("namespace", echoes=True), "with another namespace: answered HTTP 200, expected 422"),
    (LAYERS, fails_in_a_layer(name="fake"), "it has two layers of one name, or one without a name: fake, fake"),
    (LAYERS, fails_in_a_layer(name=""), "or one without a name"),
    (LAYERS, fails_in_a_layer(ok=False, error="away"), "HTTP 200 to a bust that failed in the layer outer"),
    (LAYERS, fails_in_a_layer(removed=3), "removed is 0, and of its layers together 3"),
    (REPEATS, deaf_to("kind"), "the answer to a bust by prefix tells kind None, and 'prefix' was asked"),
    (REPEATS, deaf_to("soft"), "the answer to a soft bust of a key tells soft None, and True was asked"),
    (REPEATS, deaf_to("dry_run"), "the answer to a dry run of a key tells dry_run None, and True was asked"),
    (REPEATS, deaf_to("namespace"), "the answer to a bust of a key in a namespace tells namespace None, and"),
    (REPEATS, saying({}, soft=True), "the answer to a bust of a key tells soft True, and False was asked"),
    (REPEATS, saying({"kind": "tag"}, kind="prefix"), "a bust by tag tells kind 'prefix', and 'tag' was asked"),
    (REPEATS, saying({"kind": "tag", "soft": True}, soft=None), "the answer to a soft dry run by tag in a namespace"),
    (REPEATS, saying({"kind": "all"}, kind=None), "a bust of everything in a namespace tells kind None, and 'all'"),
    (REPEATS, saying({"dry_run": True}, matched=None), "a dry run of a key tells matched None and removed 0"),
    (REPEATS, saying({"dry_run": True}, removed=2), "a dry run of a key tells matched 0 and removed 2"),
    (REPEATS, keeps_dry_runs, "a dry run of a key is accepted as a job, and should be answered at once"),
    (REPEATS, accepts_by_words_alone, "with HTTP 200, and the answer says that it is accepted"),
    (REPEATS, is_no_job, "with HTTP 202, and the answer says that it is done"),
    (
        CLAIMS,
        hearing(lambda sent: sent.get("kind") == "no-such-kind", kind="key"),
        "the kind no-such-kind, which it does",
    ),
    (CLAIMS, deaf_to("kind", echoes=True), "did a bust of the kind no-such-kind"),
    (FIELDS, hearing(lambda sent: sent.get("soft") == "yes", soft=True), "soft 'yes': answered HTTP 200, expected 422"),
    (FIELDS, hearing(lambda sent: sent.get("dry_run") == 0, dry_run=False), "dry_run '0': answered HTTP 200"),
    (FIELDS, hearing(lambda sent: sent.get("verify") == 1, verify=True), "verify '1': answered HTTP 200"),
    (FIELDS, hearing(lambda sent: sent.get("settle") == -1, settle=0), "settle '-1': answered HTTP 200, expected 422"),
    (FIELDS, hearing(lambda sent: sent.get("settle") == 3601, settle=0), "settle '3601': answered HTTP 200"),
    (FIELDS, hearing(lambda sent: sent.get("kind") == "", kind="key"), "kind '': answered HTTP 200, expected 422"),
    (FIELDS, blaming("bust", "target"), "the problem names the field 'target', not 'soft'"),
    (FIELDS, removes_what_it_refused, "a refused bust removed an entry"),
    (
        NO_NAMESPACE,
        hearing(lambda sent: sent.get("namespace") == "", namespace=None),
        "namespace '': answered HTTP 200",
    ),
    (NO_NAMESPACE, deaf_to("namespace", echoes=True), "namespace '': answered HTTP 200, expected 422"),
    (NO_NAMESPACE, removes_what_it_refused, "a refused bust removed an entry"),
    (
        UNCONFIRMED,
        hearing(lambda sent: sent.get("kind") == "all" and "confirm" not in sent, confirm=True),
        "everything is busted without confirm: answered HTTP 200, expected 422",
    ),
    (
        UNCONFIRMED,
        hearing(lambda sent: sent.get("confirm") is False, confirm=True),
        "everything is busted with confirm false: answered HTTP 200, expected 422",
    ),
    (
        UNCONFIRMED,
        hearing(lambda sent: sent.get("kind") == "all" and sent.get("confirm") is True, target="*"),
        "everything is busted with another target than *: answered HTTP 200, expected 422",
    ),
    (UNCONFIRMED, deaf_to("kind"), "everything is busted without confirm: answered HTTP 200, expected 422"),
    (UNCONFIRMED, conflicting, "answered HTTP 409, expected 422"),
    (UNCONFIRMED, blaming("bust", "kind"), "busting everything without confirm names the field 'kind'"),
    (UNCONFIRMED, removes_what_it_refused, "a refused bust of everything removed an entry"),
    (ALL, empties_everything, "a bust of everything in a namespace reached another namespace"),
    (ALL, saying({"kind": "all"}, removed=1), "of everything in a namespace of 3 entries tells removed 1, not 3"),
    (ALL, deaf_to("kind", echoes=True), "of 3 entries tells removed 0, not 3"),
    (PREFIX, dropping(lambda prefix, key: key.startswith(prefix), "prefix"), "a bust by the prefix a/b reached a/bc"),
    (PREFIX, dropping(lambda prefix, key: key == prefix[:-1], "prefix"), "a bust by the prefix a/b/ reached a/b"),
    (PREFIX, deaf_to("kind", echoes=True), "a bust by a prefix of 6 entries tells removed 1, not 6"),
    (PREFIX, deaf_to("kind"), "the answer to a bust by prefix tells kind None, and 'prefix' was asked"),
    (TAG, deaf_to("kind", echoes=True), "a bust by a tag of 2 entries tells removed 1, not 2"),
    (TAG, dropping(lambda tag, key: key == tag, "tag"), "a bust by a tag reached the key that is called so"),
    (TAG, dropping(lambda _, key: key.endswith("/c"), "tag"), "a bust by a tag reached an entry with another"),
    (SOFT, removes_soft, "a soft bust removed the entry, which should be stale"),
    (SOFT, deaf_to("soft", echoes=True), "a soft bust removed the entry, which should be stale"),
    (SOFT, deaf_to("soft"), "the answer to a soft bust of a key tells soft None, and True was asked"),
    (SOFT, saying({"soft": True}, removed=0), "a soft bust of one entry tells removed 0, not 1"),
    (APART, forgets_the_namespace, "a bust in a namespace reached another"),
    (APART, forgets_the_default_namespace, "a bust in a namespace reached the default one"),
    (APART, deaf_to("namespace"), "the answer to a bust of a key in a namespace tells namespace None, and"),
    (DRY_RUN, removes_in_a_dry_run, "a dry run over 2 entries tells matched 0, not 2"),
    (DRY_RUN, deaf_to("dry_run"), "the answer to a dry run of a key tells dry_run None, and True was asked"),
    (DRY_RUN, counts_what_is_gone, "a dry run after the bust tells matched 2, not 0"),
    (DRY_RUN, saying({"kind": "tag", "dry_run": True}, matched=5), "a dry run over 1 entries tells matched 5, not 1"),
    (
        DRY_RUN,
        saying({"kind": "prefix", "dry_run": True}, matched=1),
        "a dry run over 2 entries tells matched 1, not 2",
    ),
    (VERIFIES, deaf_to("verify"), "the answer to a bust of a key with verify does not say verified"),
    (SETTLES, deaf_to("settle"), "a bust with settle 0.5 is told to settle otherwise (fake 0)"),
    (
        SETTLES,
        hearing(lambda sent: sent.get("settle") == 0, settle=1),
        "a bust with settle 0 is told to settle otherwise",
    ),
    (STANDS, of_jobs(job="another"), "asked for a job, it tells of another"),
    (STANDS, of_jobs(reason=None), "a job tells reason None, and 'because of conformance-"),
    (STANDS, of_jobs(binding="unknown"), "a job tells binding 'unknown', and 'conformance' was asked"),
    (STANDS, of_jobs(target="*"), "a job tells target '*', and 'conformance/"),
    (STANDS, of_jobs(kind="key"), "a job tells kind 'key', and 'tag' was asked"),
    (STANDS, of_jobs(soft=False), "a job tells soft False, and True was asked"),
    (STANDS, of_jobs(strategy="direct"), "a job tells strategy 'direct', and 'hybrid' was asked"),
    (STANDS, of_jobs(ended=None), "a job that is done does not tell when it ended"),
    (STANDS, of_jobs(state="failed"), "a job that nobody cancelled is failed"),
    (STANDS, of_jobs(state="settling"), "a job that is settling tells when it ended"),
    (STANDS, of_jobs(progress={"done": 3, "total": 2}), "a job has done 3 of 2 entries"),
    (STANDS, of_jobs(state="asleep"), "state: Input should be"),
    (LISTS, listing(lambda _: []), "a bust that has a job is not in the list of them"),
    (LISTS, listing(lambda jobs: jobs[::-1]), "the newest job is not listed first"),
    (LISTS, listing(lambda jobs: jobs * 2), "with limit=1 it lists 2 jobs"),
    (LISTS, deaf_to_the_query("before"), "before does not leave out what is not older than that job"),
    (LISTS, deaf_to_the_query("state"), "with state=cancelled it lists a job that is running"),
    (QUESTIONS, takes_any_question, "?limit=0: answered HTTP 200, expected 422"),
    (NO_JOB, has_no_such_route, "GET of a job that is not known is a problem of type about:blank, not urn:bustcall:"),
    (NO_JOB, knows_every_job, "answered HTTP 200, expected 404"),
    (CANCELS, cancels_nothing, "a job is running after it was cancelled"),
    (CANCELS, of_jobs("DELETE", state="done"), "a job that would go on for 60 s is done after it was cancelled"),
    (CANCELS, revives, "a job that was cancelled is waiting when it is asked for again, or ended again"),
    (OVER_STAYS, cancels_what_is_over, "a job that was done is cancelled after it was cancelled, or ended again"),
    (JOB_OF_A_KEY, makes_a_job_of_each_repeat, "the answer to a repeat is another than the first"),
    (JOB_OF_A_KEY, without("Idempotency-Replayed", 202), "the answer to a repeat has Idempotency-Replayed None"),
    (BUST_DEPENDENTS, answering("POST", "bust", removed=1), "with 2 dependents tells removed 1, not 3"),
    (BUST_DEPENDENTS, answering("POST", "bust", removed=3), "a direct bust of one entry tells removed 3"),
    (BUST_DEPENDENTS, busts_one_dependent, "with 2 dependents tells removed 1, not 3"),
    ("answers a capability document with its own", other_document, "with another one than its own"),
    ("answers a capability document with its own", answering("POST", "capabilities", 202), "answered HTTP 202"),
    ("refuses what is no capability document", accepting("capabilities"), "answered HTTP 200, expected 400 or 422"),
    ("keeps what is announced of dependencies", unsorted, "versions 2.0.0-rc.1, 1.2.0, 1.0.0, not as current 1.2.0"),
    ("keeps what is announced of dependencies", answering("POST", "dependencies", current="9.0.0"), "current 9.0.0"),
    ("keeps what is announced of dependencies", renames, "is not listed as it was answered"),
    ("refuses announcements that say no dependency", accepting("dependencies"), "answered HTTP 200, expected 422"),
    ("refuses announcements that say no dependency", blaming("dependencies", None), "names the field None"),
    ("refuses announcements that say no dependency", keeps_what_it_refused, "whose announcement was refused"),
    ("refuses announcements that say no dependency", follows_what_it_refused, "changed what is known"),
    (FORGETS, forgets_nothing, "a forgotten dependency is still listed, or another is not"),
    (FORGETS, forgets_everything, "a forgotten dependency is still listed, or another is not"),
    (FORGETS, misses_what_is_forgotten, "answered HTTP 404, expected 200"),
    (FORGETS, answering("POST", "dependencies/forget", name="another"), "it tells that it forgot another dependency"),
    (FORGETS, answering("POST", "dependencies/forget", 409), "answered HTTP 409, expected 200"),
    (FORGETS_UNUSED, forgets_what_is_in_use, "a dependency changed that could not be forgotten"),
    (FORGETS_UNUSED, answering("POST", "dependencies/forget", 409), "answered HTTP 409, expected 200"),
    ("resolves a spec to the best known version", wrong_version, "@latest is 2.1.0-rc.1 (experimental), not 2.0.0"),
    ("resolves a spec to the best known version", answering("POST", "resolve", 404), "answered HTTP 404"),
    ("resolves a spec to the best known version", answering("POST", "resolve", state="new"), "state: Input should be"),
    ("refuses specs that mean no known version", blaming("resolve", "name"), "names the field 'name', not 'spec'"),
    ("refuses specs that mean no known version", accepting("resolve"), "answered HTTP 200, expected 422"),
    ("swaps dependencies", answering("POST", "hotswap", committed=False), "was not committed"),
    ("swaps dependencies", answering("POST", "hotswap", swaps=[]), "does not tell what was replaced"),
    ("swaps dependencies", swaps_nothing, "is told as current 1.0.0"),
    ("answers a repeated swap from memory", without("Idempotency-Replayed", 200), "Idempotency-Replayed None"),
    ("answers a repeated swap from memory", swaps_again, "the current version is 1.1.0, and should be 1.0.0"),
    ("answers a repeated swap from memory", accepting("hotswap"), "answered HTTP 200, expected 422"),
    ("remembers no refused swap under a key", RemembersRefusals(), "answered HTTP 409, expected 200"),
    ("remembers no refused swap under a key", replays_at_once, "the first success of a key has"),
    ("keeps to the rules of hot swaps", accepting("hotswap", committed=True), "answered HTTP 200, expected 409"),
    ("keeps to the rules of hot swaps", swaps_the_first, "the current version is 2.0.0, and should be 1.0.0"),
    ("swaps all or none", swaps_the_first, "the current version is 1.1.0, and should be 1.0.0"),
    ("refuses what is no swap", blaming("hotswap", None), "names the field None, not 'swaps'"),
    ("refuses what is no swap", accepting("hotswap"), "answered HTTP 200, expected 422"),
    (DEPENDENTS, answering("POST", "hotswap", busted=1), "a swap of what 3 entries depend on tells busted 1, not 3"),
    (DEPENDENTS, answering("POST", "hotswap", busted=0), "a swap of what 3 entries depend on tells busted 0, not 3"),
    (DEPENDENTS, answering("POST", "hotswap", busted=3), "a swap of what 0 entries depend on tells busted 3, not 0"),
    (DEPENDENTS, busts_one_dependent, "a swap of what 3 entries depend on tells busted 1, not 3"),
    (DEPENDENTS, busts_everything, "an entry was busted that does not depend"),
]


@pytest.mark.parametrize(("name", "defect", "detail"), DEFECTS)
async def test_a_daemon_with_one_defect_does_not_pass(name: str, defect: Defect, detail: str) -> None:
    """The check that looks for it tells what was found instead."""
    async with bent(defect) as url:
        verdict = await judged(name, url)
    assert verdict.outcome == "failed"
    assert detail in verdict.detail


@pytest.mark.parametrize(("name", "defect", "detail"), OF_STREAMS)
async def test_a_daemon_with_one_defect_in_what_it_tells_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, name: str, defect: Telling, detail: str
) -> None:
    """The check that looks for it tells what was found instead; what is not told is not waited for long."""
    monkeypatch.setattr(reader, "_SOON", 0.5)
    async with bent(defect) as url:
        verdict = await judged(name, url, [*EVERYTHING, STREAM], timeout=1.0 if "it is live" in detail else PATIENCE)
    assert verdict.outcome == "failed"
    assert detail in verdict.detail


async def test_a_daemon_that_refuses_without_a_reason_does_not_pass() -> None:
    """A refused swap says in `unmet` why."""

    def silent(exchange: Exchange) -> None:
        if exchange.status == 409:
            exchange.say(unmet=[])

    async with bent(silent) as url:
        assert "does not say in unmet why" in (await judged("swaps all or none", url)).detail


async def test_without_a_defect_the_same_daemon_passes() -> None:
    """So it is the defects that are found."""
    for defect in (lambda _: None, Telling()):
        async with bent(defect) as url:
            assert failed(await check_daemon(url, strict=True)) == {}


async def test_what_others_do_and_what_is_not_known_changes_nothing_in_what_is_told() -> None:
    """Busts of somebody else, in the midst of it, and events of a later version; two runs at once."""

    def rumours(heard: Heard) -> list[Heard | bytes]:
        others = bust_at(heard.at(10 * heard.number - 1), 10 * heard.number - 1, "others/a")
        before = others if heard.name == "bust" else b": a comment\n\nevent: rumour\ndata: nothing\n\n"
        return [before, heard.at(10 * heard.number)]

    def place(wanted: list[tuple[str, str]], after: str | None) -> tuple[list[tuple[str, str]], str | None]:
        return wanted, after.removesuffix("0") if after is not None and after.endswith("0") else after

    async with bent(Telling(rumours, ask=place)) as url:
        for verdicts in await asyncio.gather(check_daemon(url), check_daemon(url)):
            assert {name: why for name, why in failed(verdicts).items() if name in OF_EVENTS} == {}
            assert not {*skipped(verdicts)} & {*OF_EVENTS}


@pytest.mark.parametrize("capabilities", [(), ("cache.bust.tag",)])
async def test_a_daemon_that_tells_and_has_nothing_else_is_judged_by_what_it_has(capabilities: Sequence[str]) -> None:
    """Keys alone, or tags, and nothing registered."""
    async with in_memory() as url:
        for name in OF_EVENTS:
            verdict = await judged(name, url, ["cache.bust", STREAM, *capabilities])
            assert verdict.outcome == ("passed" if {*named(name).needs} <= {STREAM, *capabilities} else "skipped")


async def test_a_heartbeat_that_is_long_is_not_waited_for() -> None:
    """The verdict says so."""
    async with in_memory(beat=60.0) as url:
        verdict = await judged(HEARTBEAT, url, [*EVERYTHING, STREAM])
    assert (verdict.outcome, verdict.detail) == ("skipped", "not decided: it would say so every 60 s only")


async def test_what_a_cache_cannot_have_is_not_missed_in_what_is_told() -> None:
    """Keys of files, for example, have no question marks."""

    def refuses(exchange: Exchange) -> None:
        if exchange.asks() and "?" in exchange.sent["target"]:
            exchange.status = 422
            exchange.body = json.dumps({"title": "No", "status": 422, "detail": "no", "field": "target"}).encode()

    def hears(sent: dict[str, Any]) -> dict[str, Any]:
        return {**sent, "dry_run": True} if "?" in sent["target"] else sent

    async with bent(Telling(hear=hears, say=refuses)) as url:
        assert (await judged(BY_PREFIX, url, [*EVERYTHING, STREAM])).outcome == "passed"


async def test_a_cache_that_does_not_tell_what_it_removes_is_judged_by_what_it_tells_of_swaps() -> None:
    """Nothing can be said of its busts, which the verdict says."""

    def silent(exchange: Exchange) -> None:
        if exchange.is_("POST", "bust") and exchange.status == 200:
            exchange.say(removed=None)

    async with bent(silent) as url:
        assert (await judged(DEPENDENTS, url)).outcome == "passed"
        verdict = await judged(BUST_DEPENDENTS, url)
    assert verdict.outcome == "skipped"
    assert "not decided: a bust of a target with 2 dependents tells removed None" in verdict.detail


async def test_what_may_be_a_cheat_or_a_cache_of_files_is_not_decided() -> None:
    """A daemon that tells of no entry that it was there says the same as a cache that was never filled."""
    async with bent(busts_no_dependents) as url:
        verdicts = [await judged(name, url) for name in (BUST_DEPENDENTS, DEPENDENTS)]
    assert {verdict.outcome for verdict in verdicts} == {"skipped"}
    for verdict, told in zip(verdicts, ("removed 0", "busted 0"), strict=True):
        assert told in verdict.detail
        assert verdict.detail.endswith("and so is a daemon that busts nothing of it")


@pytest.mark.parametrize(
    ("name", "sound", "detail"),
    [
        (ONCE, "answers a repeat of a key from memory", r"of 8 requests .* at once, \d and not 1 were done anew"),
        (SWAPS_ONCE, "remembers no refused swap under a key", "answered HTTP 409, expected 200"),
    ],
)
async def test_a_daemon_that_looks_and_then_acts_does_not_pass(name: str, sound: str, detail: str) -> None:
    """One request after another it serves well."""
    async with careless() as url:
        assert (await judged(sound, url)).outcome == "passed"
        verdict = await judged(name, url)
    assert verdict.outcome == "failed"
    assert re.fullmatch(detail, verdict.detail)


async def test_requests_at_once_of_which_one_gets_no_answer_are_no_answer() -> None:
    """The others are waited for."""
    async with FakeDaemon([Answer(), Answer(reset=True)], capabilities=[IDEMPOTENT]) as fake:
        verdict = await judged(ONCE, fake.url)
        assert len(fake.requests) == 8
    assert (verdict.outcome, verdict.answered) == ("failed", False)


def test_every_check_was_seen_to_fail() -> None:
    """Of those that came with the extensions; the others are failed by the daemons above and by the peers' tests."""
    planted = {name for name, _, _ in (*DEFECTS, *OF_STREAMS)} | {
        CONNECTIONS,
        STEP,
        PIECES,
        HEAD,
        BUSTS_AGAIN,
        *OF_KEYS,
    }
    extensions = {check.name for check in CHECKS if check.needs or check.any_of}
    assert extensions | {*OF_DOCUMENTS, LAYERS, CLAIMS} <= planted
    assert len({check.name for check in CHECKS}) == len(CHECKS)
