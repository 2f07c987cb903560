"""Reading the manifest again while requests are served: keys, issuers, limits and certificates change at once."""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec.structs import fields, replace

from llmserve.bus.base import Bus, Subscription
from llmserve.bus.messages import AnyMessage, Reload, Reloaded
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.schema import Limits, Manifest, Security

log = logging.getLogger(__name__)


class Reloader:
    """``read`` gives the manifest anew, ``apply`` makes it so; both may raise ``ManifestError`` or ``OSError``."""

    def __init__(
        self,
        bus: Bus,
        member_id: str,
        metrics: GatewayMetrics,
        manifest: Manifest,
        read: Callable[[], Manifest],
        apply: Callable[[Manifest], None],
    ) -> None:
        self._bus = bus
        self._member_id = member_id
        self._metrics = metrics
        self._manifest = manifest
        self._read = read
        self._apply = apply
        self._subscription: Subscription | None = None

    async def start(self) -> None:
        self._subscription = await self._bus.subscribe(self._bus.subjects.admin, self._hear)

    async def stop(self) -> None:
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    def reload(self) -> Reloaded:
        """Read and apply. On an error all stays as it is, and the answer says why."""
        try:
            manifest = self._read()
            self._apply(manifest)
        except (ManifestError, OSError) as error:
            log.error("reload refused, nothing was changed: %s", error)
            self._metrics.reloads.labels("refused").inc()
            return Reloaded(member=self._member_id, problem=str(error))
        before, self._manifest = self._manifest, manifest
        self._metrics.reloads.labels("done").inc()
        done = Reloaded(
            member=self._member_id,
            changed=reloaded_parts(before, manifest),
            restart=parts_for_a_restart(before, manifest),
        )
        log.info("reloaded: changed %s, for the next start %s", done.changed or "nothing", done.restart or "nothing")
        return done

    def _hear(self, message: AnyMessage) -> None:
        if isinstance(message, Reload):
            self._bus.publish(self._bus.subjects.gateway(message.reply_to), self.reload())


def reloaded_parts(before: Manifest, after: Manifest) -> list[str]:
    """Sections that differ and are in force now. Files that the manifest names are not compared."""
    parts = []
    if _who(before) != _who(after):
        parts.append("spec.security")
    if _limits(before) != _limits(after):
        parts.append("spec.scheduling.fair_share.tenants limits")
    return parts


def parts_for_a_restart(before: Manifest, after: Manifest) -> list[str]:
    """Sections that differ in what is read at a start only."""
    old, new = _without_reloaded(before).spec, _without_reloaded(after).spec
    names = [field.name for field in fields(old)]
    return [f"spec.{name}" for name in names if getattr(old, name) != getattr(new, name)]


def _who(manifest: Manifest) -> Security:
    return replace(manifest.spec.security, cache_sharing={})


def _limits(manifest: Manifest) -> dict[str, Limits]:
    return {name: tenant.limits for name, tenant in manifest.spec.scheduling.fair_share.tenants.items()}


def _without_reloaded(manifest: Manifest) -> Manifest:
    spec = manifest.spec
    tenants = {name: replace(tenant, limits=Limits()) for name, tenant in spec.scheduling.fair_share.tenants.items()}
    security = Security(cache_sharing=spec.security.cache_sharing)
    share = replace(spec.scheduling.fair_share, tenants=tenants)
    return replace(
        manifest,
        spec=replace(spec, security=security, scheduling=replace(spec.scheduling, fair_share=share)),
    )
