"""A key-value bucket on JetStream, laid out as the stock tools do it (ADR-8)."""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.bus.jetstream import WRONG_LAST_SEQUENCE, ApiError, JetStream


@dataclass(frozen=True, slots=True)
class Entry:
    """A value and its revision, which only grows."""

    value: bytes
    revision: int


class KeyValue:
    """Keys are tokens joined by dots. Every operation raises ``BusUnavailable`` when patience ends."""

    def __init__(self, api: JetStream, bucket: str) -> None:
        self._api = api
        self._stream = f"KV_{bucket}"
        self._prefix = f"$KV.{bucket}."

    async def get(self, key: str) -> Entry | None:
        found = await self._api.get_last(self._stream, self._prefix + key)
        return None if found is None else Entry(found.data, found.seq)

    async def put(self, key: str, value: bytes) -> int:
        """Set the value whatever is there; its revision."""
        return await self._api.publish(self._prefix + key, value, {})

    async def update(self, key: str, value: bytes, revision: int) -> int | None:
        """Set the value if ``revision`` is the current one (0: if there is none); the new one, None otherwise."""
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        try:
            return await self._api.publish(self._prefix + key, value, headers)
        except ApiError as error:
            if error.failure.err_code != WRONG_LAST_SEQUENCE:
                raise
        # A try whose answer was lost may have been the one that wrote it.
        standing = await self.get(key)
        return standing.revision if standing is not None and standing.value == value else None

    async def remove(self, key: str) -> None:
        """Leave no trace of a key."""
        await self._api.purge(self._stream, self._prefix + key)

    async def keys(self, below: str) -> list[str]:
        """All keys that begin with the tokens ``below``, in no order."""
        found = await self._api.subjects(self._stream, f"{self._prefix}{below}.>")
        return [subject.removeprefix(self._prefix) for subject in found]
