"""``llmserve reload``: have a running deployment's gateways read their manifest and its files again."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys

from llmserve.bus.base import BusError
from llmserve.bus.messages import AnyMessage, Heartbeat, Reload, Reloaded, Role
from llmserve.cli.deployment import LISTEN_S, add_deployment_arguments, bus_of
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.loader import load, resolve
from llmserve.manifests.schema import Manifest

add_arguments = add_deployment_arguments


def run(arguments: argparse.Namespace) -> int:
    """2 if the manifest is wrong, 1 if a gateway refuses it, does not answer, or none is there."""
    try:
        manifest = resolve(load(arguments.manifest), os.environ)
        answers, silent = asyncio.run(reloaded(manifest, arguments.nats))
    except (ManifestError, BusError) as error:
        print(error, file=sys.stderr)
        return 2
    for answer in answers:
        print(f"{answer.member}: {_described(answer)}")
    for member in silent:
        print(f"{member}: no answer", file=sys.stderr)
    if not answers and not silent:
        print("no gateway is there", file=sys.stderr)
    return 0 if answers and not silent and not any(answer.problem for answer in answers) else 1


async def reloaded(manifest: Manifest, url: str | None) -> tuple[list[Reloaded], list[str]]:
    """The gateways' answers, and the gateways that were heard and gave none. Raises ``BusError``."""
    gateways: set[str] = set()
    answers: dict[str, Reloaded] = {}

    def hear(message: AnyMessage) -> None:
        if isinstance(message, Heartbeat) and message.role is Role.GATEWAY and not message.leaving:
            gateways.add(message.member)
        elif isinstance(message, Reloaded):
            answers[message.member] = message

    async with bus_of(manifest, url, "reload") as bus:
        me = f"reload-{secrets.token_hex(6)}"
        await bus.subscribe(bus.subjects.heartbeats, hear)
        await bus.subscribe(bus.subjects.gateway(me), hear)
        bus.publish(bus.subjects.admin, Reload(reply_to=me))
        await asyncio.sleep(LISTEN_S)
    return [answers[member] for member in sorted(answers)], sorted(gateways - set(answers))


def _described(answer: Reloaded) -> str:
    if answer.problem:
        return f"refused, nothing was changed: {answer.problem}"
    text = "read again" + (f"; changed: {', '.join(answer.changed)}" if answer.changed else "")
    return text + (f"; needs a restart: {', '.join(answer.restart)}" if answer.restart else "")
