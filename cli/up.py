"""``llmserve up``: the whole stack of a manifest from one command, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import uvloop

from llmserve.bus.base import BusError
from llmserve.bus.telemetry import configure_logging
from llmserve.cli.display import Progress
from llmserve.cli.stack import Stack, StackFailed
from llmserve.gateway.log import BindCaller
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.loader import load, resolve
from llmserve.manifests.models import ModelError
from llmserve.manifests.schema import Manifest
from llmserve.manifests.state import state_dir
from llmserve.manifests.support import require_supported
from llmserve.workers.engine.base import EngineError

logger = logging.getLogger("llmserve.up")

STOP_S = 8.0
"""Time for an orderly end; what is left after it is ended with the process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--manifest", required=True, help="the manifest, such as manifests/local.yaml")
    parser.add_argument(
        "--nats", metavar="URL", help="use this nats-server; by default the manifest's, or an embedded one"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--log-json", action="store_true", help="log JSON lines instead of text")
    parser.add_argument("--log-here", action="store_true", help="log to the terminal instead of the state folder")


def run(arguments: argparse.Namespace) -> int:
    try:
        manifest = resolve(load(arguments.manifest), os.environ)
        require_supported(manifest)
        terminal = _terminal(manifest, arguments.log_here)
    except (ManifestError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(getattr(logging, arguments.log_level.upper()), json=arguments.log_json, filters=(BindCaller(),))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_up(manifest, arguments, terminal))


@dataclass(frozen=True, slots=True)
class _Terminal:
    """Where a person reads; everything else, the engines' own output too, goes to ``log``."""

    out: TextIO
    err: TextIO
    log: Path | None


def _terminal(manifest: Manifest, log_here: bool) -> _Terminal:
    """Send this process's output and that of its children to the log, and keep the terminal for ourselves."""
    if log_here:
        return _Terminal(sys.stdout, sys.stderr, None)
    folder = state_dir(manifest, os.environ)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / "up.log"
    terminal = _Terminal(os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w"), log)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    return terminal


async def _up(manifest: Manifest, arguments: argparse.Namespace, terminal: _Terminal) -> int:
    begun_s = time.monotonic()
    progress = Progress(terminal.out)
    progress.line(f"llmserve: {manifest.metadata.name}, from {arguments.manifest}")
    if terminal.log is not None:
        progress.line(f"log: {terminal.log}")
    stack = Stack(
        manifest, progress, arguments.nats, read_manifest=lambda: resolve(load(arguments.manifest), os.environ)
    )
    # A terminal that is closed sends it too, and means the end.
    if not os.isatty(0):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, stack.reload)
    stopping = _stop_signal()
    code = 0
    try:
        serving = asyncio.create_task(_serve(stack, progress, begun_s))
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    except* (BusError, EngineError, ModelError, OSError, StackFailed) as errors:
        for error in _leaves(errors):
            what = error.strerror if isinstance(error, OSError) else str(error)
            print(f"llmserve up: {what}", file=terminal.err, flush=True)
        code = 2 if not stack.started else 1
    except* Exception:
        logger.exception("up failed")
        where = f": see {terminal.log}" if terminal.log is not None else ""
        print(f"llmserve up: unexpected error{where}", file=terminal.err, flush=True)
        code = 1
    progress.line("stopping ...")
    try:
        await asyncio.wait_for(stack.stop(), STOP_S)
    except TimeoutError:
        logger.warning("not everything stopped in %.0f s: ended with the process", STOP_S)
    progress.line("stopped")
    return code


async def _serve(stack: Stack, progress: Progress, begun_s: float) -> None:
    await stack.start()
    progress.line(
        f"\nready after {time.monotonic() - begun_s:.0f} s: {stack.url}/v1   metrics: {stack.metrics_url}\n"
    )
    progress.line(_try_it(stack) + "\n\nCtrl-C stops everything.")
    await stack.run()


def _try_it(stack: Stack) -> str:
    model = stack.manifest.spec.models.primary
    body = {
        "model": model.served_name or model.id,
        "stream": True,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    key = " -H 'authorization: Bearer '$API_KEY" if stack.manifest.spec.security.api_keys else ""
    return f"curl -N {stack.url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{json.dumps(body)}'"


def _stop_signal() -> asyncio.Future[None]:
    """Done at the first SIGINT or SIGTERM; the second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if stopping.done():
            os._exit(130)
        stopping.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return stopping


def _leaves(errors: BaseExceptionGroup[Exception]) -> list[Exception]:
    leaves: list[Exception] = []
    for error in errors.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
