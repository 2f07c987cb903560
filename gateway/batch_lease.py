"""The right of one gateway to run a batch, which it renews for as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

from llmserve.bus.base import BusError
from llmserve.gateway.batch_store import BatchStore, lease_key

RENEW_S = 2.0
LOST_AFTER_S = 7.0
"""A lease that is not renewed for so long is another gateway's for the taking."""


class LeaseLost(Exception):
    """Another gateway has the batch."""


class Lease:
    """The right to run one batch, as of the revision that ``take`` or a renewal has written."""

    def __init__(self, store: BatchStore, tenant: str, batch_id: str, member_id: str, revision: int) -> None:
        self._keys = store.keys
        self._key = lease_key(tenant, batch_id)
        self._member_id = member_id
        self._revision = revision

    async def take(self) -> bool:
        """Make it ours, unless another gateway has done so since ``revision``."""
        try:
            await self._renew()
        except LeaseLost:
            return False
        return True

    async def renew_forever(self) -> None:
        """Raises ``LeaseLost``, also when the bus is away for so long that another may have it."""
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                async with asyncio.timeout(LOST_AFTER_S - RENEW_S):
                    await self._renew()
            except (BusError, TimeoutError) as error:
                raise LeaseLost from error

    async def release(self) -> None:
        """For another to take at once."""
        with contextlib.suppress(LeaseLost):
            await self._write(b"")

    async def end(self) -> None:
        """The batch has ended."""
        await self._keys.remove(self._key)

    async def _renew(self) -> None:
        await self._write(f"{self._member_id} {uuid.uuid4().hex}".encode())

    async def _write(self, value: bytes) -> None:
        revision = await self._keys.update(self._key, value, self._revision)
        if revision is None:
            raise LeaseLost
        self._revision = revision
