"""``llmserve status``: the members of a deployment and what they do, heard from their heartbeats."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from llmserve.bus.base import BusError
from llmserve.bus.messages import AnyMessage, Heartbeat, Role
from llmserve.cli.deployment import LISTEN_S, add_deployment_arguments, bus_of
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.loader import load, resolve
from llmserve.manifests.schema import Manifest

add_arguments = add_deployment_arguments


def run(arguments: argparse.Namespace) -> int:
    try:
        manifest = resolve(load(arguments.manifest), os.environ)
        members = asyncio.run(heard(manifest, arguments.nats))
    except (ManifestError, BusError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(members))
    return 0 if members else 1


async def heard(manifest: Manifest, url: str | None) -> list[Heartbeat]:
    """The last heartbeat of every member. Raises ``BusError``."""
    members: dict[str, Heartbeat] = {}

    def hear(message: AnyMessage) -> None:
        if isinstance(message, Heartbeat):
            members[message.member] = message

    async with bus_of(manifest, url, "status") as bus:
        await bus.subscribe(bus.subjects.heartbeats, hear)
        await asyncio.sleep(LISTEN_S)
    order = list(Role)
    return sorted(members.values(), key=lambda member: (order.index(member.role), member.member))


def table(members: list[Heartbeat]) -> str:
    """Aligned text, a line per member."""
    if not members:
        return "nobody is there"
    rows = [("ROLE", "MEMBER", "HOST", "PID", "STATE", "RUNNING", "HELD", "SLOTS", "PAGES")]
    for member in members:
        held = sum(running.held for running in member.running)
        used = member.pages_total - member.pages_free
        worker = member.slots > 0
        rows.append(
            (
                member.role.value,
                member.member,
                member.host,
                str(member.pid),
                "draining" if member.draining else "up",
                str(len(member.running) - held) if worker else "-",
                str(held) if worker else "-",
                str(member.slots) if worker else "-",
                f"{used}/{member.pages_total}" if worker else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{member.member}: pages move by {member.transports}" for member in members if member.transports]
    lines += [f"{member.member}: {member.cache}" for member in members if member.cache]
    return "\n".join(lines)
