"""The command line: the client's calls, in the words of the API.

It decides how results read on a terminal and as JSON, and which exit code they make; it does nothing that the API
could not. Targets are shown whole here: they are the caller's own, on the caller's own terminal.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
import threading
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import asdict
from functools import partial, wraps
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

import click
from pydantic import SecretStr

from pybustcall.bustcall_core import BustcallClient, ClientOutbox
from pybustcall.capabilities import VERSION, unmet_here
from pybustcall.cli_daemon import daemon
from pybustcall.config import settings_from_env, settings_from_toml
from pybustcall.errors import BustFailed, ConfigurationError, DaemonsUnavailable, DeadlineExceeded, InvalidRequest
from pybustcall.events import BustEvent, Reset
from pybustcall.faults import FaultKind, check_tolerance, raises
from pybustcall.hotswap import Swap
from pybustcall.jobs import MAX_JOBS, BustJob
from pybustcall.models import DEFAULT_STRATEGY, EVERYTHING, KINDS, MAX_TARGET_BYTES, JobState, check_target
from pybustcall.needs import remedy_of
from pybustcall.outbox import RowState
from pybustcall.results import BustResult, error_class, summary
from pybustcall.terminal import INTERRUPTED, REFUSED, UNAVAILABLE, USAGE, Failure, printable, run_through

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence

    from click._termui_impl import ProgressBar

    from pybustcall.capabilities import DaemonCapabilities
    from pybustcall.events import EventStream
    from pybustcall.hotswap import Dependency, Resolution, SwapResult
    from pybustcall.models import CapabilityDocument, DaemonStatus, Kind

__all__ = ["cli", "run"]

_T = TypeVar("_T")

_PATIENCE: Final = 2.0  # seconds after which it is told that a stream of events is waited for


def run() -> None:
    """Run the command line and exit; no traceback ever reaches the user for an error that has a name."""
    try:
        code = cli.main(standalone_mode=False, prog_name="pybustcall")
    except click.ClickException as error:
        error.show()
        sys.exit(error.code if isinstance(error, Failure) else error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:  # standard output, and nothing else: every other one has a name by now
        _mute()
        if not isinstance(error, BrokenPipeError):
            click.echo(f"Error: standard output cannot be written: {error.strerror}", err=True)
        sys.exit(REFUSED)
    sys.exit(code if isinstance(code, int) else 0)


def _mute() -> None:
    """Send standard output nowhere, so that the interpreter does not complain about it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="pybustcall")
def cli() -> None:
    """Drop old values from caches, through bustcall daemons.

    Settings come from BUSTCALL_* variables (BUSTCALL_URL, BUSTCALL_PEERS, BUSTCALL_TOKEN, ...), from the file given
    with --config instead (but for the token), and from the options, which win. --url names all the daemons together
    with --peer: peers from elsewhere do not join it.
    """


def _asking_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command that only asks the same options, but for the outbox: it has no use for one."""
    return _client_options(command, outbox=False)


def _client_options(command: Callable[..., int], *, outbox: bool = True) -> Callable[..., int]:
    """Give a command the options that say which daemons to ask, and the client made of them."""
    has_outbox = outbox

    @click.option("--url", help="The hub's URL: http://, https:// or unix:///path/of.sock.")
    @click.option("--peer", "peers", multiple=True, help="A peer's URL; repeat it for more.")
    @click.option("--timeout", type=float, help="Seconds that one call may take in all.")
    @click.option(
        "--token-file", type=click.Path(path_type=Path), help="File with the bearer token (or set BUSTCALL_TOKEN)."
    )
    @click.option("--config", type=click.Path(path_type=Path), help="TOML file with a table [pybustcall].")
    @wraps(command)
    def with_client(
        *,
        url: str | None,
        peers: tuple[str, ...],
        timeout: float | None,
        token_file: Path | None,
        config: Path | None,
        outbox: Path | None = None,
        **own: Any,
    ) -> int:
        try:
            settings = settings_from_env() if config is None else settings_from_toml(config)
            given: dict[str, Any] = {"url": url, "timeout": timeout}
            if not has_outbox:
                settings = settings.model_copy(update={"outbox": None})
            given["outbox"] = None if outbox is None else str(outbox)
            given["peers"] = peers if peers or url is not None else None
            if token_file is not None:
                given["token"] = SecretStr(_read_token(token_file))
            elif settings.token is None and os.environ.get("BUSTCALL_TOKEN"):
                given["token"] = SecretStr(os.environ["BUSTCALL_TOKEN"])
            client = BustcallClient.of_settings(
                settings.model_copy(update={name: value for name, value in given.items() if value is not None})
            )
        except ConfigurationError as error:
            raise Failure(str(error), USAGE) from error
        return command(client, **own)

    if has_outbox:
        outbox_option = click.option("--outbox", type=click.Path(path_type=Path), help="File of undelivered busts.")
        return outbox_option(with_client)
    return with_client


def _read_token(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigurationError(f"token file {path}: cannot be read ({error.strerror})", setting="token") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"token file {path}: holds more than visible ASCII", setting="token") from error


cli.add_command(daemon)


@cli.command()
@click.argument("targets", nargs=-1, metavar="TARGET...")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="key",
    show_default=True,
    help='What each TARGET names; "all" takes --confirm and no TARGET.',
)
@click.option("--confirm", is_flag=True, help="Say that everything is meant, with --kind all.")
@click.option("--strategy", default=DEFAULT_STRATEGY, show_default=True, help="direct, dimensional or hybrid.")
@click.option("--soft", is_flag=True, help="Mark as stale instead of removing.")
@click.option("--namespace", metavar="NS", help="Whose entries; the daemon's default one if not given.")
@click.option("--dry-run", is_flag=True, help="Tell how many entries would go, and remove none.")
@click.option("--verify", is_flag=True, help="Have the daemon read back that nothing is left.")
@click.option("--settle", type=float, metavar="SECONDS", help="Bust a second time after so long; 0 for never.")
@click.option("--allow-wider", is_flag=True, help="Where a daemon cannot do it, have it do the next wider.")
@click.option("--reason", metavar="TEXT", help="Why, for the daemon's audit.")
@click.option("--fault-tolerance", type=int, help="0 to 12; fails iff the stage is below 12 minus this.")
@click.option("--delivery", type=click.Choice(["first", "quorum", "all"]), help="How many daemons must acknowledge.")
@click.option("--concurrency", type=click.IntRange(1), default=64, show_default=True, help="Busts under way at once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each target.")
@_client_options
def bust(
    client: BustcallClient,
    targets: tuple[str, ...],
    kind: Kind,
    fault_tolerance: int | None,
    concurrency: int,
    as_json: bool,
    **how: Any,
) -> int:
    """Have the old value of each TARGET dropped; a TARGET of "-" reads more from standard input, one a line."""
    if kind == "all" and targets not in {(), (EVERYTHING,)}:
        raise click.UsageError('--kind all drops everything, and takes no TARGET but "*"')
    if kind == "all" and not how["confirm"]:
        raise click.UsageError("--kind all drops everything in the namespace, and takes --confirm; nothing was sent")
    if kind != "all" and not targets:
        raise click.UsageError("Missing argument 'TARGET...'.")
    try:
        for target in targets:
            check_target(target)
        tolerance = client.fault_tolerance if fault_tolerance is None else check_tolerance(fault_tolerance)
    except InvalidRequest as error:
        raise Failure(str(error), USAGE) from error
    how |= {"kind": kind, "concurrency": concurrency}
    return run_through(_bust(client, targets or (EVERYTHING,), tolerance, how, as_json=as_json))


async def _bust(
    client: BustcallClient, targets: tuple[str, ...], tolerance: int, how: dict[str, Any], *, as_json: bool
) -> int:
    """Bust the targets and tell each result; `how` is what is the same for all of them."""
    codes: set[int] = set()
    unwritten: list[OSError] = []
    known = None if "-" in targets else len(targets)
    hidden = as_json or known == 1 or not sys.stderr.isatty()
    progress: ProgressBar[None] = click.progressbar(
        repeat(None) if known is None else None,
        length=known,
        label="busting",
        file=sys.stderr,
        hidden=hidden,
        show_pos=True,
    )
    with progress as bar:

        def tell(result: BustResult) -> None:
            raised = raises(result.stage, tolerance)
            codes.add(_code_of(result) if raised else 0)
            try:
                if as_json:
                    click.echo(json.dumps(_as_dict(result, tolerated=not raised)))
                elif raised or not result.ok:
                    click.echo(_as_line(result, tolerated=not raised) + _remedy(result, how), err=True)
                elif hidden:
                    click.echo(_as_line(result, tolerated=True))
            except OSError as error:  # the busts go on: what reads our output is not what they are for
                unwritten.append(error)
                _mute()
            bar.update(1)

        async with client:
            report = await client.bust_many(_targets(targets), on_progress=tell, fault_tolerance=tolerance, **how)
    if report.total != 1 and not as_json:
        later = report.deferred + report.partial + report.accepted
        kept = f", {later} kept for later" if later else ""
        done = (
            f"{report.dry_run} of {report.total} told"
            if how["dry_run"]
            else f"{report.busted} of {report.total} busted"
        )
        click.echo(f"{done}{kept} in {report.elapsed:.3f} s", err=True)
    if unwritten and not isinstance(unwritten[0], BrokenPipeError):
        click.echo(f"Error: not every result could be written: {unwritten[0].strerror}", err=True)
        codes.add(REFUSED)
    return REFUSED if REFUSED in codes else max(codes, default=0)


def _code_of(result: BustResult) -> int:
    """Tell the exit code of a bust that failed: whether trying again may help."""
    if result.ok or result.job is not None:
        return REFUSED  # it was applied, or a daemon goes on with it: there is nothing to try again
    may_help = {DaemonsUnavailable, DeadlineExceeded}
    return UNAVAILABLE if not result.causes or error_class("exhausted", result.causes) in may_help else REFUSED


def _as_line(result: BustResult, *, tolerated: bool) -> str:
    if result.ok:
        where = f" by {result.daemon}" if result.daemon else ""
        done = "marked stale" if result.soft else "removed"
        gone = f", {result.removed} {done}" if result.removed is not None else ""
        if result.dry_run:
            gone = (
                f", would {'mark' if result.soft else 'remove'} {result.matched}" if result.matched is not None else ""
            )
        after = f", after faults: {'; '.join(summary(result.causes))}" if result.causes else ""
        note = f"; {result.note}" if result.note else ""
        below = "" if tolerated else f"; stage {result.stage} is below the tolerance"
        status = result.status.replace("_", " ")
        return f"{status} {result.target}{where} in {result.elapsed:.3f} s{gone}{after}{note}{below}"
    reasons = "; ".join([*summary(result.causes), *([result.note] if result.note else [])]) or "the deadline was over"
    told = f"{result.status} {result.target!r} (stage {result.stage}, applied: {result.applied})"
    return f"{told}, in the outbox: {reasons}" if result.rows else f"{told}: {reasons}"


def _remedy(result: BustResult, how: dict[str, Any]) -> str:
    """Say what to do if it failed for nothing but what no daemon here can do; nothing otherwise."""
    if not result.causes or any(cause.kind is not FaultKind.UNSUPPORTED for cause in result.causes) or result.ok:
        return ""
    option = None if how["allow_wider"] else "--allow-wider"
    return f". {remedy_of(result.kind, soft=result.soft, dry_run=result.dry_run, option=option)}"


def _as_dict(result: BustResult, *, tolerated: bool) -> dict[str, Any]:
    return {
        "target": result.target,
        "ok": result.ok,
        "tolerated": tolerated,
        "status": result.status,
        "stage": result.stage,
        "band": result.band,
        "oversight": result.oversight,
        "applied": result.applied,
        "daemon": result.daemon,
        "cache_key": result.cache_key,
        "delegate": result.delegate,
        "reported_stage": result.reported_stage,
        "removed": result.removed,
        "kind": result.kind,
        "namespace": result.namespace,
        "soft": result.soft,
        "dry_run": result.dry_run,
        "matched": result.matched,
        "verified": result.verified,
        "layers": [asdict(layer) for layer in result.layers],
        "job": result.job,
        "elapsed": round(result.elapsed, 6),
        "key": result.key,
        "rows": result.rows,
        "note": result.note,
        "deliveries": [
            {
                "daemon": delivery.daemon,
                "status": delivery.status,
                "stage": delivery.stage,
                "row": delivery.row,
                "job": delivery.job,
            }
            for delivery in result.deliveries
        ],
        "attempts": [
            {
                "daemon": attempt.daemon,
                "stage": attempt.stage,
                "elapsed": round(attempt.elapsed, 6),
                "error": None if attempt.error is None else {"kind": attempt.error.kind, "text": attempt.error.message},
            }
            for attempt in result.attempts
        ],
    }


async def _targets(targets: Sequence[str]) -> AsyncIterator[str]:
    for target in targets:
        if target != "-":
            yield target
            continue
        async for line in _lines():
            yield line


async def _lines() -> AsyncIterable[str]:
    """Read standard input line by line without blocking the event loop; empty lines are passed over.

    The reading thread uses the bare descriptor, so that it can be left behind when the command is interrupted.
    """
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise InvalidRequest("standard input is closed, so no targets can be read from it", field="targets")
    try:
        read: Callable[[], bytes] = partial(os.read, stream.fileno(), 65536)
    except (io.UnsupportedOperation, AttributeError):  # not a file, as under test
        read = partial(stream.read, 65536)
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)

    def feed() -> None:
        try:
            while True:
                chunk = read()
                asyncio.run_coroutine_threadsafe(chunks.put(chunk), loop).result()
                if not chunk:
                    return
        except (RuntimeError, CancelledError):  # the loop has ended without us
            return

    threading.Thread(target=feed, name="pybustcall-stdin", daemon=True).start()
    rest = b""
    while chunk := await chunks.get():
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[: 2 * MAX_TARGET_BYTES]  # enough to be refused as too long, whatever follows
        for line in lines:
            if text := line.strip(b"\r\n"):
                yield text.decode("utf-8", "surrogateescape")
    if text := rest.strip(b"\r\n"):
        yield text.decode("utf-8", "surrogateescape")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each daemon.")
@_asking_options
def status(client: BustcallClient, as_json: bool) -> int:
    """Tell how each daemon is. Exits with 0 only if every one of them answered."""

    def tell(reply: DaemonStatus) -> str:
        return f"up, pid {reply.daemon_pid}, cache {reply.cache_size}, faults remembered: {len(reply.fault_history)}"

    def to_json(reply: DaemonStatus) -> dict[str, Any]:
        return reply.model_dump(mode="json", exclude={"daemon"})

    return run_through(_ask_each(client, client.status, tell, to_json, as_json=as_json))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each daemon.")
@_asking_options
def capabilities(client: BustcallClient, as_json: bool) -> int:
    """Tell what each daemon can do. Exits with 0 only if every one of them answered."""

    def tell(reply: DaemonCapabilities) -> str:
        names = ", ".join(sorted(reply.names)) or "nothing advertised"
        binding = f"{reply.document.binding} {reply.document.version}" if reply.document else "base protocol only"
        return f"{binding}: {names}{_requirements(reply.document)}"

    def to_json(reply: DaemonCapabilities) -> dict[str, Any]:
        return {
            "base_only": reply.base_only,
            "capabilities": sorted(reply.names),
            "document": reply.document.model_dump(mode="json") if reply.document else None,
            "bindings": {name: binding.model_dump(mode="json") for name, binding in reply.bindings.items()},
            "unmet": [] if reply.document is None else list(unmet_here(reply.document)),
        }

    return run_through(_ask_each(client, client.capabilities, tell, to_json, as_json=as_json))


def _requirements(document: CapabilityDocument | None) -> str:
    if document is None or (document.requires.semverx, document.requires.capabilities) == ("*", ()):
        return ""
    requires = document.requires
    told = ", ".join([*([f"version {requires.semverx}"] if requires.semverx != "*" else []), *requires.capabilities])
    lacks = unmet_here(document)
    return f"; requires of clients: {told} ({'; '.join(lacks) if lacks else 'this one fits'})"


async def _ask_each(
    client: BustcallClient,
    ask: Callable[..., Awaitable[_T]],
    tell: Callable[[_T], str],
    to_json: Callable[[_T], dict[str, Any]],
    *,
    as_json: bool,
) -> int:
    codes = {0}
    async with client:
        for daemon in client.daemons:
            try:
                reply = await ask(daemon=daemon)
            except BustFailed as error:
                codes.add(UNAVAILABLE if isinstance(error, DaemonsUnavailable | DeadlineExceeded) else REFUSED)
                told = "; ".join(cause.message for cause in error.causes) or str(error)
                line = {"daemon": daemon, "ok": False, "error": type(error).__name__, "text": told}
                click.echo(json.dumps(line) if as_json else f"{daemon}: {told}", err=not as_json)
            else:
                line = {"daemon": daemon, "ok": True, **to_json(reply)}
                click.echo(json.dumps(line) if as_json else f"{daemon}: {printable(tell(reply))}")
    return REFUSED if REFUSED in codes else max(codes)


@cli.command()
@click.argument("spec")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def resolve(client: BustcallClient, spec: str, as_json: bool) -> int:
    """Tell which known version of a cache dependency SPEC means, such as "pricing-model@^2.0.0"."""

    def tell(found: Resolution) -> list[str]:
        return [f"{found.resolved} ({found.state}) by {found.daemon}"]

    def to_json(found: Resolution) -> dict[str, Any]:
        return {
            "spec": found.spec,
            "resolved": found.resolved,
            "version": str(found.version),
            "state": found.state,
            "daemon": found.daemon,
        }

    return run_through(_use(client, lambda: client.resolve(spec), tell, to_json, as_json=as_json))


@cli.command()
@click.argument("name")
@click.argument("versions", nargs=-1, required=True, metavar="VERSION...")
@click.option("--current", help="The version in use; the best VERSION if this is the first that is told of NAME.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def announce(client: BustcallClient, name: str, versions: tuple[str, ...], current: str | None, as_json: bool) -> int:
    """Tell a daemon that there is a cache dependency NAME in these VERSIONs."""
    return run_through(
        _use(
            client,
            lambda: client.announce(name, versions, current=current),
            lambda known: [_dependency(known)],
            asdict,
            as_json=as_json,
        )
    )


def _dependency(known: Dependency) -> str:
    return f"{known.name}: current {known.current}, known {', '.join(known.versions)}, by {known.daemon}"


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def dependencies(client: BustcallClient, as_json: bool) -> int:
    """List the cache dependencies that a daemon knows, with their current versions."""

    def to_json(known: tuple[Dependency, ...]) -> dict[str, Any]:
        return {"dependencies": [asdict(one) for one in known]}

    def tell(known: tuple[Dependency, ...]) -> list[str]:
        return [_dependency(one) for one in known] or ["no dependency was announced"]

    return run_through(_use(client, client.dependencies, tell, to_json, as_json=as_json))


@cli.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def forget(client: BustcallClient, name: str, as_json: bool) -> int:
    """Have a daemon forget the cache dependency NAME, on which nothing depends any more."""
    return run_through(
        _use(
            client,
            lambda: client.forget(name),
            lambda daemon: [f"forgot {name} by {daemon}"],
            lambda daemon: {"name": name, "daemon": daemon},
            as_json=as_json,
        )
    )


@cli.command()
@click.argument("key")
@click.option("--depends-on", "names", multiple=True, metavar="NAME", help="What KEY was made of; repeat it for more.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag by which it is busted; repeat it for more.")
@click.option("--ttl", type=float, metavar="SECONDS", help="How long the cache holds it.")
@click.option("--namespace", metavar="NS", help="Whose entry it is.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def register(
    client: BustcallClient,
    key: str,
    names: tuple[str, ...],
    tags: tuple[str, ...],
    ttl: float | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Tell a daemon that its cache holds KEY, made of what each NAME names; a second time replaces the first."""
    return run_through(
        _use(
            client,
            lambda: client.register(key, names, tags=tags, ttl=ttl, namespace=namespace),
            lambda daemon: [f"registered {key} by {daemon}"],
            lambda daemon: {
                "key": key,
                "depends_on": names,
                "tags": tags,
                "ttl": ttl,
                "namespace": namespace,
                "daemon": daemon,
            },
            as_json=as_json,
        )
    )


@cli.command("hot-swap")
@click.argument("swaps", nargs=-1, required=True, metavar="NAME=VERSION...")
@click.option(
    "--from",
    "expected",
    multiple=True,
    metavar="NAME=VERSION",
    help="The version that must be current before, or nothing is swapped; repeat it.",
)
@click.option("--allow-experimental", is_flag=True, help="Take experimental versions.")
@click.option("--validated", is_flag=True, help="What replaces an experimental version was tried in its place.")
@click.option("--migrate", is_flag=True, help="What depends on a legacy version is ready for a stable one.")
@click.option("--rollback", is_flag=True, help="Go back, which alone may lead to a legacy version.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def hot_swap(
    client: BustcallClient,
    swaps: tuple[str, ...],
    expected: tuple[str, ...],
    allow_experimental: bool,
    validated: bool,
    migrate: bool,
    rollback: bool,
    as_json: bool,
) -> int:
    """Make each VERSION of the cache dependency NAME the current one, all or none, and bust what depends on them."""

    def swap(text: str) -> Swap:
        name, version = _named_version(text, "a swap")
        return Swap(
            name,
            version,
            from_=current.pop(name, None),
            allow_experimental=allow_experimental,
            validated=validated,
            migrate=migrate,
            rollback=rollback,
        )

    def tell(done: SwapResult) -> list[str]:
        after = f", after faults: {'; '.join(summary(done.causes))}" if done.causes else ""
        swapped = [f"swapped {swap.name} from {swap.from_} to {swap.to}" for swap in done.swaps]
        return [*swapped, f"committed by {done.daemon} in {done.elapsed:.3f} s, {done.busted} busted{after}"]

    def to_json(done: SwapResult) -> dict[str, Any]:
        return {
            "swaps": [{"name": swap.name, "from": swap.from_, "to": swap.to} for swap in done.swaps],
            "busted": done.busted,
            "daemon": done.daemon,
            "stage": done.stage,
            "elapsed": round(done.elapsed, 6),
            "key": done.key,
        }

    current = dict(_named_version(text, "--from") for text in expected)
    if len(current) < len(expected):
        raise click.UsageError("--from names a dependency twice; say of each once which version must be current")
    asked = [swap(text) for text in swaps]
    if current:
        raise click.UsageError(f"--from names {', '.join(current)}, which is not swapped here")
    return run_through(_use(client, lambda: client.hot_swap(asked), tell, to_json, as_json=as_json))


def _named_version(text: str, what: str) -> tuple[str, str]:
    name, equals, version = text.rpartition("=")
    if not equals:
        raise click.UsageError(f"{what} is NAME=VERSION, such as pricing-model=2.1.0, not {text!r}")
    return name, version


async def _use(
    client: BustcallClient,
    call: Callable[[], Awaitable[_T]],
    tell: Callable[[_T], list[str]],
    to_json: Callable[[_T], dict[str, Any] | list[dict[str, Any]]],
    *,
    as_json: bool,
    verdict: Callable[[_T], int] = lambda _: 0,
    patience: str = "--timeout",
) -> int:
    """Make one call of the client and tell what it came to, or why it failed and which rules are not met.

    `to_json` makes the JSON object, or one a line; `verdict` tells the exit code of what it came to. `patience` is the
    option that allows more time.
    """
    async with client:
        try:
            done = await call()
        except BustFailed as error:
            reasons = list(dict.fromkeys(reason for cause in error.causes for reason in cause.unmet))
            text = re.sub(r"\b(with )?timeout=", rf"\1{patience}", str(error))
            text = re.sub(r"\bdaemon=", "--url", text)
            line = {"ok": False, "error": type(error).__name__, "text": text, "applied": error.applied}
            if as_json:
                click.echo(json.dumps({**line, "unmet": reasons}))
            else:
                told = [f"Error: {text}", *(reason for reason in reasons if reason not in text)]
                click.echo("\n".join(printable(text) for text in told), err=True)
            return UNAVAILABLE if isinstance(error, DaemonsUnavailable | DeadlineExceeded) else REFUSED
    if as_json:
        found = to_json(done)
        for line in found if isinstance(found, list) else [found]:
            click.echo(json.dumps({"ok": True, **line}))
    else:
        click.echo("\n".join(printable(text) for text in tell(done)))
    return verdict(done)


@cli.command()
@click.argument("url")
@click.option("--strict", is_flag=True, help="Ask also for what only daemons of ours must do.")
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="File with the bearer token (or set BUSTCALL_TOKEN)."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds for each request.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each check.")
def conformance(url: str, strict: bool, token_file: Path | None, timeout: float, as_json: bool) -> int:
    """Check that the daemon at URL, in whatever language, does what this client relies on.

    It busts and registers keys that begin with "conformance/", in namespaces that begin with "conformance-" where the
    daemon has namespaces; a journal shows that. It announces dependencies that begin with "conformance-", which are
    forgotten at the end where the daemon can. What the daemon does not advertise is skipped.
    Exits with 1 if a check failed, with 3 if nothing answered.
    """
    from pybustcall.testing import check_daemon  # noqa: PLC0415 - it loads a web server

    try:
        token = os.environ.get("BUSTCALL_TOKEN") or None if token_file is None else _read_token(token_file)
        verdicts = asyncio.run(check_daemon(url, token=token, strict=strict, timeout=timeout))
    except ConfigurationError as error:
        raise Failure(str(error), USAGE) from error
    answered = any(verdict.answered and not verdict.skipped for verdict in verdicts)
    if not answered and not as_json:
        why = printable(verdicts[0].detail.removeprefix("no answer: "))
        raise Failure(f"nothing answered at {url}: {why}", UNAVAILABLE)
    words = {"passed": "pass", "failed": "FAIL", "skipped": "skipped"}
    width = max(len(verdict.name) for verdict in verdicts)
    for verdict in verdicts:
        line = {"check": verdict.name, "verdict": words[verdict.outcome], "detail": verdict.detail}
        text = f"{verdict.name:<{width}}  {words[verdict.outcome]:<7}  {printable(verdict.detail)}"
        click.echo(json.dumps(line) if as_json else text.rstrip())
    count = Counter(verdict.outcome for verdict in verdicts)
    if not as_json:
        click.echo(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    if count["failed"] and all("HTTP 401" in verdict.detail for verdict in verdicts if not verdict.ok):
        wanted = "a token" if token is None else "another token"
        click.echo(f"each failure is a 401: the daemon wants {wanted} (--token-file or BUSTCALL_TOKEN)", err=True)
    if not answered:
        return UNAVAILABLE
    return REFUSED if count["failed"] else 0


@cli.group()
def jobs() -> None:
    """See to the busts in a daemon's journal: list, show, await or cancel them.

    Journals are each daemon's own: --daemon says whose it is; otherwise it is the first that answers, the hub first.
    """


_daemon_option: Final = click.option("--daemon", metavar="URL", help="Which of the daemons to ask.")


@jobs.command("list")
@click.option("--limit", type=click.IntRange(1, MAX_JOBS), default=100, show_default=True, help="Jobs to list at most.")
@click.option("--before", metavar="JOB", help="Go on from this job, the last one listed.")
@click.option("--state", type=click.Choice(get_args(JobState)), help="Only those in this state.")
@_daemon_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each job.")
@_asking_options
def jobs_list(
    client: BustcallClient,
    limit: int,
    before: str | None,
    state: JobState | None,
    daemon: str | None,
    as_json: bool,
) -> int:
    """List the busts in the journal, the newest first."""

    def call() -> Awaitable[tuple[BustJob, ...]]:
        return client.jobs(limit=limit, before=before, state=state, daemon=daemon)

    def tell(found: tuple[BustJob, ...]) -> list[str]:
        return [f"{_job_line(job)}, asked for by {job.who} at {job.at}{_reason(job)}" for job in found] or ["no jobs"]

    return run_through(_use(client, call, tell, lambda found: [_job_dict(job) for job in found], as_json=as_json))


@jobs.command("show")
@click.argument("job")
@_daemon_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def jobs_show(client: BustcallClient, job: str, daemon: str | None, as_json: bool) -> int:
    """Tell all of one JOB."""
    return run_through(_use(client, lambda: client.job(job, daemon=daemon), _job_lines, _job_dict, as_json=as_json))


@jobs.command("cancel")
@click.argument("job")
@_daemon_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def jobs_cancel(client: BustcallClient, job: str, daemon: str | None, as_json: bool) -> int:
    """Have no more done for JOB; what was removed stays removed. Exits with 1 if it was over before."""
    was_over = False

    async def call() -> BustJob:
        nonlocal was_over
        found = await client.job(job, daemon=daemon)
        was_over = found.is_over
        return found if was_over else await client.cancel_job(job, daemon=found.daemon)

    def verdict(found: BustJob) -> int:
        return 0 if found.state == "cancelled" and not was_over else REFUSED

    return run_through(_use(client, call, _job_lines, _job_dict, as_json=as_json, verdict=verdict))


@jobs.command("wait")
@click.argument("job")
@click.option(
    "--for",
    "seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait at most.",
)
@_daemon_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_asking_options
def jobs_wait(client: BustcallClient, job: str, seconds: float, daemon: str | None, as_json: bool) -> int:
    """Wait until JOB is over. Exits with 0 if it is done, with 1 if cancelled or failed, with 3 if it still goes on."""

    def verdict(found: BustJob) -> int:
        return 0 if found.state == "done" else REFUSED

    call = partial(client.wait_job, job, timeout=seconds, daemon=daemon)
    return run_through(_use(client, call, _job_lines, _job_dict, as_json=as_json, verdict=verdict, patience="--for"))


def _job_line(job: BustJob) -> str:
    what = f"{'soft ' if job.soft else ''}{job.kind} {job.target!r}"
    of = "" if job.total is None else f" of {job.total}"
    return f"{job.job} {job.state} {what} ({job.namespace or 'default'}), {job.done}{of} done, {job.removed} removed"


def _reason(job: BustJob) -> str:
    return f", reason: {job.reason}" if job.reason is not None else ""


def _job_lines(job: BustJob) -> list[str]:
    ended = f", ended {job.ended}" if job.ended is not None else ""
    who = f"by {job.who} ({job.binding}) through {job.via or 'an unnamed daemon'}"
    told = [_job_line(job), f"{job.strategy}, {who}{_reason(job)}, at {job.at}{ended}, told by {job.daemon}"]
    for layer in job.layers:
        state = "applied" if layer.ok else f"not applied: {layer.error or 'no reason was told'}"
        if layer.ok and layer.waits:
            state += ", and again once the layers inside of it are"
        told.append(f"layer {layer.name}: {state}, {layer.removed} removed")
    return told


def _job_dict(job: BustJob) -> dict[str, Any]:
    return {
        **asdict(job),
        "at": str(job.at),
        "ended": None if job.ended is None else str(job.ended),
    }


@cli.command()
@click.option("--prefix", "prefixes", multiple=True, help="Only what concerns keys below it; repeat it for more.")
@click.option("--tag", "tags", multiple=True, help="Only what concerns entries with it; repeat it for more.")
@click.option("--namespace", metavar="NS", help="Whose entries; the daemon's default one if not given.")
@_daemon_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each bust.")
@_asking_options
def watch(
    client: BustcallClient,
    prefixes: tuple[str, ...],
    tags: tuple[str, ...],
    namespace: str | None,
    daemon: str | None,
    as_json: bool,
) -> int:
    """Print what the daemons bust, as it happens, until Ctrl-C."""

    async def call() -> int:
        async with client.events(prefix=prefixes, tags=tags, namespace=namespace, daemon=daemon) as events:
            await _tell_events(events, as_json=as_json)
        return 0

    return run_through(_use(client, call, lambda _: [], lambda _: [], as_json=as_json))


async def _tell_events(events: EventStream, *, as_json: bool) -> None:
    """Print events, and say if they do not come at first."""
    try:
        await events.wait_live(_PATIENCE)
    except TimeoutError:
        click.echo(printable(f"waiting: {events.reason}"), err=True)
    async for event in events:
        if as_json:
            name = "bust" if isinstance(event, BustEvent) else "reset"
            click.echo(json.dumps({"event": name, **asdict(event)}))
        else:
            click.echo(printable(_event_line(event)))


def _event_line(event: BustEvent | Reset) -> str:
    if isinstance(event, Reset):
        return f"reset by {event.daemon}: {event.reason}"
    done = "marked stale" if event.soft else "busted"
    also = f", and with it {', '.join(map(repr, event.also))}" if event.also else ""
    what = f"{event.kind} {event.target!r} ({event.namespace}, {event.strategy})"
    return f"{done} {what}{also}, told by {event.daemon} as {event.id}"


@cli.group()
def outbox() -> None:
    """See to the busts that are kept in an outbox: list, replay, retry or purge them.

    The file is named by --outbox, by BUSTCALL_OUTBOX or in the file given with --config.
    """


@outbox.command("list")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Rows to list at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each row.")
@_client_options
def outbox_list(client: BustcallClient, limit: int, as_json: bool) -> int:
    """List what is in the outbox, in the order of delivery."""

    async def work(box: ClientOutbox) -> int:
        for row in await box.rows(limit=limit):
            shown = {
                "row": row.id,
                "state": row.state,
                "target": row.bust.target,
                "kind": row.bust.kind,
                "namespace": row.bust.namespace,
                "strategy": row.bust.strategy,
                "soft": row.bust.soft,
                "destination": row.destination or "any",
                "attempts": row.attempts,
                "sent": row.sent,
                "created": row.created,
                "reason": row.reason,
            }
            line = f"{row.id} {row.state} {row.bust.target!r} for {shown['destination']}, attempts: {row.attempts}"
            click.echo(json.dumps(shown) if as_json else printable(f"{line}: {row.reason}" if row.reason else line))
        counts = await box.counts()
        if not as_json:
            told = f"{counts.pending} pending, {counts.leased} being delivered, {counts.aside} set aside"
            click.echo(
                told if counts.oldest is None else f"{told}; the oldest waits for {counts.oldest:.0f} s", err=True
            )
        return 0

    return run_through(_with_outbox(client, work))


@outbox.command("replay")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_client_options
def outbox_replay(client: BustcallClient, as_json: bool) -> int:
    """Deliver now what can be delivered. Exits with 3 if something is left, and says why it is."""

    async def work(box: ClientOutbox) -> int:
        report = await box.replay()
        told = {"delivered": report.delivered, "refused": report.refused, "left": report.left}
        text = f"{report.delivered} delivered, {report.refused} refused and set aside, {report.left} left"
        click.echo(json.dumps(told) if as_json else text)
        if not report.ok:
            await _tell_left(client, box)
        return 0 if report.ok else UNAVAILABLE

    return run_through(_with_outbox(client, work))


async def _tell_left(client: BustcallClient, box: ClientOutbox) -> None:
    """Say why rows are left: each reason once, and how often."""
    reasons: Counter[str] = Counter()
    for row in await box.rows():
        if row.state is RowState.ASIDE:
            continue
        if row.destination not in {"", *client.daemons}:
            reasons[f"for {row.destination}, which is none of the daemons here (see --url and --peer)"] += 1
        elif row.state is RowState.LEASED:
            reasons["another process is delivering it, or was killed while it did: its lease has to end"] += 1
        else:
            reasons[row.reason or "its turn has not come"] += 1
    for reason, times in reasons.most_common(5):
        click.echo(printable(f"{times} left: {reason}"), err=True)


@outbox.command("retry")
@click.argument("rows", nargs=-1, type=int, metavar="[ROW]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_client_options
def outbox_retry(client: BustcallClient, rows: tuple[int, ...], as_json: bool) -> int:
    """Let the ROWs that were set aside be delivered again; without a ROW, all of them."""

    async def work(box: ClientOutbox) -> int:
        count = await box.retry(rows or None)
        click.echo(json.dumps({"retried": count}) if as_json else f"{count} will be delivered again")
        return _all_of_them(rows, count, "not every ROW was set aside; see pybustcall outbox list")

    return run_through(_with_outbox(client, work))


@outbox.command("purge")
@click.argument("rows", nargs=-1, type=int, metavar="[ROW]...")
@click.option("--all", "everything", is_flag=True, help="Also what waits for its delivery: it will never be delivered.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_client_options
def outbox_purge(client: BustcallClient, rows: tuple[int, ...], everything: bool, as_json: bool) -> int:
    """Delete the ROWs that were set aside; without a ROW, all of them."""

    async def work(box: ClientOutbox) -> int:
        count = await box.purge(rows or None, aside_only=not everything)
        click.echo(json.dumps({"purged": count}) if as_json else f"{count} deleted")
        return _all_of_them(rows, count, "not every ROW was set aside; --all deletes those that still wait, too")

    return run_through(_with_outbox(client, work))


def _all_of_them(rows: tuple[int, ...], count: int, hint: str) -> int:
    """Tell the exit code of a command for certain rows, and the hint if it did not find them all."""
    if count >= len(set(rows)):
        return 0
    click.echo(hint, err=True)
    return REFUSED


async def _with_outbox(client: BustcallClient, work: Callable[[ClientOutbox], Awaitable[int]]) -> int:
    try:
        box = client.outbox
        if not Path(box.path).exists():  # noqa: ASYNC240 - before anything else runs in this loop
            raise Failure(f"there is no outbox at {box.path}", USAGE)
        return await work(box)
    finally:
        await client.aclose()
