"""The command that runs the reference daemon."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pybustcall.errors import ConfigurationError
from pybustcall.models import Requirements
from pybustcall.terminal import CANNOT_START, Failure, run_through

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pybustcall.daemon.configuration import Configuration, Finding
    from pybustcall.daemon.engine import Layer
    from pybustcall.models import Access

__all__ = ["daemon"]


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with all settings, and with layers.")
@click.option("--check", "only_check", is_flag=True, help="Tell what is wrong with the settings, and do not serve.")
@click.option("--host", show_default="127.0.0.1", help="Address to listen on; another needs a token.")
@click.option("--port", type=click.IntRange(0, 65535), show_default="8989", help="0 lets the system choose.")
@click.option("--socket", type=click.Path(path_type=Path), help="Unix socket to listen on instead.")
@click.option("--backend", type=click.Choice(["memory", "files"]), help="What to bust; files if --root is given.")
@click.option("--root", type=click.Path(path_type=Path), help="Directory of the files backend: a key is a path below.")
@click.option("--register", type=click.Path(path_type=Path), help='JSON file {"entry": ["what it depends on"]}.')
@click.option("--allow-host", "hosts", multiple=True, help="A name that a Host header may say, beside the own ones.")
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="File with the token to ask for (or BUSTCALL_TOKEN)."
)
@click.option(
    "--operator-token-file",
    type=click.Path(path_type=Path),
    help="File with a second token, which opens what is private, too (or BUSTCALL_OPERATOR_TOKEN).",
)
@click.option(
    "--access", multiple=True, metavar="NAME=TIER", help="Make a capability public, protected or private; repeat it."
)
@click.option("--require-semverx", metavar="RANGE", show_default="*", help="The SemverX versions of clients.")
@click.option(
    "--require-capability",
    "required",
    multiple=True,
    metavar="NAME",
    help="What clients must be able to do; repeat it.",
)
@click.option("--state", type=click.Path(path_type=Path), help="File to remember idempotency keys in, over restarts.")
@click.option(
    "--registry",
    type=click.Path(path_type=Path),
    help="File to keep dependencies and registered entries in, over restarts; by default beside the journal.",
)
@click.option(
    "--journal", type=click.Path(path_type=Path), help="File to write busts down in, so that they survive a crash."
)
@click.option("--drain", type=click.FloatRange(0, 3600), show_default="10.0", help="Seconds to finish in.")
@click.option("--json", "as_json", is_flag=True, help="Say where it listens, or what is wrong, as JSON.")
def daemon(
    *,
    config: Path | None,
    only_check: bool,
    backend: str | None,
    root: Path | None,
    register: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Run the reference daemon until SIGTERM or Ctrl-C; says on standard output where it listens.

    Options win over the file given with --config. With --check it exits with 0 if all is in order, and with 4 if not.
    """
    try:
        from pybustcall import daemon as package  # noqa: PLC0415 - needs an extra
        from pybustcall.daemon.configuration import (  # noqa: PLC0415 - likewise
            Configuration,
            FilesLayer,
            InvalidConfiguration,
            MemoryLayer,
            load,
            read,
        )
    except ImportError as error:
        raise Failure(str(error), CANNOT_START) from error
    if (backend == "files" or (backend is None and root is not None)) != (root is not None):
        raise click.UsageError("the files backend and --root DIRECTORY go together")
    try:
        configuration = Configuration() if config is None else (read if only_check else load)(config)
        if root is not None or backend is not None:
            layer = MemoryLayer(backend="memory") if root is None else FilesLayer(backend="files", root=str(root))
            try:
                configuration = configuration.with_layer(layer)
            except InvalidConfiguration as error:
                if not only_check:
                    raise
                configuration = replace(configuration, findings=(*configuration.findings, *error.findings))
        given = _given_to_daemon(configuration, **options)
        if only_check:
            return run_through(_check_daemon(configuration, register, given, as_json=as_json))
        _serve(configuration, register, given, as_json=as_json)
    except InvalidConfiguration as error:
        if not only_check:
            raise Failure(str(error), CANNOT_START) from error
        _tell_findings(error.findings, as_json=as_json)
        return CANNOT_START
    except (ConfigurationError, package.BackendFailure) as error:
        raise Failure(str(error), CANNOT_START) from error
    return 0


def _given_to_daemon(
    configuration: Configuration,
    *,
    hosts: tuple[str, ...],
    access: tuple[str, ...],
    require_semverx: str | None,
    required: tuple[str, ...],
    **same: Any,
) -> dict[str, Any]:
    """Tell the settings that the options gave; what the others need of the file is in them."""
    document = configuration.document
    given = {**same, "allowed_hosts": hosts or None}
    if access:
        given["access"] = {**document.access.tiers, **_access(access)}
    if require_semverx is not None or required:
        given["requires"] = Requirements(
            semverx=document.requires.semverx if require_semverx is None else require_semverx,
            capabilities=required or document.requires.capabilities,
        )
    return {name: value for name, value in given.items() if value is not None}


async def _check_daemon(
    configuration: Configuration, register: Path | None, given: dict[str, Any], *, as_json: bool
) -> int:
    """Tell all that is wrong, one finding a line."""
    from pybustcall.daemon.checking import check  # noqa: PLC0415 - needs an extra

    checked = await check(configuration, os.environ, register=register, **given)
    _tell_findings(checked.findings, as_json=as_json)
    for warning in checked.warnings:
        line = {"ok": True, "file": warning.file, "key": warning.key, "warning": warning.text}
        click.echo(json.dumps(line) if as_json else str(replace(warning, text=f"warning: {warning.text}")))
    if checked.findings:
        return CANNOT_START
    count = len(checked.layers)
    told = f"in order: {count} layer{'s' if count > 1 else ''}: {_named(checked.layers)}"
    if checked.lacking:
        told += "; not advertised: "
        told += ", ".join(f"{name} (lacked by {', '.join(layers)})" for name, layers in checked.lacking.items())
    line = {
        "ok": True,
        "file": configuration.file,
        "layers": _layers_as_dicts(checked.layers),
        "lacking": checked.lacking,
    }
    click.echo(json.dumps(line) if as_json else ": ".join(filter(None, [configuration.file, told])))
    return 0


def _tell_findings(findings: Iterable[Finding], *, as_json: bool) -> None:
    for finding in findings:
        line = {"ok": False, "file": finding.file, "key": finding.key, "text": finding.text}
        click.echo(json.dumps(line) if as_json else str(finding))


def _serve(configuration: Configuration, register: Path | None, given: dict[str, Any], *, as_json: bool) -> None:
    """Serve until told to stop. What keeps it from starting is told at its key, if the file says it."""
    from pybustcall.daemon import Engine, serve  # noqa: PLC0415 - needs an extra
    from pybustcall.daemon.configuration import InvalidConfiguration  # noqa: PLC0415 - likewise
    from pybustcall.daemon.index import Indexes  # noqa: PLC0415 - likewise

    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    settings = configuration.settings(os.environ, **given)
    indexes = Indexes(most=settings.max_namespaces)
    layers = configuration.layers(indexes, os.environ)

    def ready(url: str) -> None:
        kinds = ", ".join(layer.backend.name for layer in layers)
        told = {"url": url, "pid": os.getpid(), "backend": kinds, "layers": _layers_as_dicts(layers)}
        shown = f"{kinds} backend" if [layer.name for layer in layers] == [kinds] else f"layers: {_named(layers)}"
        click.echo(json.dumps(told) if as_json else f"bustcall daemon listening on {url} ({shown})")  # and flushes it

    try:
        engine = Engine(layers, indexes)
        if entries := register or configuration.register:
            engine.load_registrations(entries)
        run_through(serve(engine, settings, ready=ready))
    except ConfigurationError as error:
        by_option = {*given, *(["entries"] if register is not None else [])}
        raise InvalidConfiguration([configuration.finding(error.setting, str(error), by_option)]) from error


def _named(layers: Sequence[Layer]) -> str:
    return ", ".join(f"{layer.name} ({layer.number})" for layer in layers)


def _layers_as_dicts(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    return [{"name": layer.name, "number": layer.number, "backend": layer.backend.name} for layer in layers]


def _access(given: tuple[str, ...]) -> dict[str, Access]:
    """Read NAME=TIER; whether there are such names and tiers is the daemon's to say."""
    pairs = [text.partition("=") for text in given]
    if not all(equals for _, equals, _ in pairs):
        raise click.UsageError("--access takes NAME=TIER, such as cache.bust=public")
    return {name: cast("Access", tier) for name, _, tier in pairs}
