"""Whether the deployment can serve: which roles were heard of lately."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from llmserve.bus.messages import AnyMessage, Heartbeat, Role
from llmserve.manifests.schema import Manifest

SILENT_AFTER_S = 3.0


def needed_roles(manifest: Manifest) -> tuple[Role, ...]:
    """Roles without which no request of this manifest is served."""
    workers = (Role.PREFILL, Role.DECODE) if manifest.spec.deployment.replicas.prefill else (Role.BOTH,)
    return (Role.ROUTER, *workers)


class Readiness:
    """Hears heartbeats. A broken connection shows as silence: then nobody is heard."""

    def __init__(self, needed: Collection[Role], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._needed = needed
        self._clock_s = clock_s
        self._members: dict[str, tuple[Role, float]] = {}

    def hear(self, message: AnyMessage) -> None:
        """Handler of the heartbeats' subject."""
        if not isinstance(message, Heartbeat):
            return
        if message.leaving or message.draining:
            self._members.pop(message.member, None)
        else:
            self._members[message.member] = (message.role, self._clock_s())

    def missing(self) -> str:
        """The roles of which no member is alive, as one line; empty if none is missing."""
        oldest_s = self._clock_s() - SILENT_AFTER_S
        self._members = {member: seen for member, seen in self._members.items() if seen[1] >= oldest_s}
        alive = {role for role, _ in self._members.values()}
        lacking = [role.value for role in self._needed if role not in alive]
        return f"no live member of role {', '.join(lacking)}" if lacking else ""
