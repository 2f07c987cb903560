"""How simulated engines settle a handoff: the reader asks the owner over TCP whether the pages were valid all along.

No page bytes travel, the reader only lets the time pass that they would take; but owner, lease and failure are real:
a dead owner refuses the connection, an expired or released lease answers ``stale``. One connection per owner, one
line ``take <key>`` per handoff, answered by ``ok <key>`` or ``stale <key>``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger("llmserve.simulated")


class PeerGone(Exception):
    """The owner of the pages cannot be reached."""


class PageOwner:
    """Answers readers. ``take(key)`` gives the pages up and says whether they were still held."""

    def __init__(self, take: Callable[[str], bool]) -> None:
        self._take = take
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, host: str) -> tuple[str, int]:
        """Listen on a free port of ``host``; returns the address that readers connect to."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        address = self._server.sockets[0].getsockname()
        return str(address[0]), int(address[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                verb, _, key = line.decode("ascii", "replace").strip().partition(" ")
                if verb != "take":
                    logger.warning("closing a connection that sent %r", line[:80])
                    return
                writer.write(f"{'ok' if self._take(key) else 'stale'} {key}\n".encode("ascii", "replace"))
        except (ConnectionError, ValueError) as error:
            logger.info("reader of handed-off pages is gone: %s", error)
        finally:
            self._writers.discard(writer)
            writer.close()


class PageReader:
    """Asks owners; keeps one connection to each."""

    def __init__(self) -> None:
        self._peers: dict[tuple[str, int], _Peer] = {}

    async def take(self, address: tuple[str, int], key: str) -> bool:
        """Take over the pages of ``key``; False if they are not valid any more. Raises ``PeerGone``."""
        peer = self._peers.get(address)
        if peer is None or peer.lost:
            peer = self._peers[address] = _Peer(address)
        return await peer.take(key)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


class _Peer:
    def __init__(self, address: tuple[str, int]) -> None:
        self.lost = False
        self._address = address
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[str, asyncio.Future[bool]] = {}
        self._reading = asyncio.create_task(self._read())
        self._unsent: list[str] = []

    async def take(self, key: str) -> bool:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[key] = answer
        if self._writer is None:
            self._unsent.append(key)
        else:
            self._writer.write(f"take {key}\n".encode("ascii"))
        try:
            return await answer
        finally:
            self._answers.pop(key, None)

    def close(self) -> None:
        self._reading.cancel()

    async def _read(self) -> None:
        cause = "connection closed"
        try:
            reader, self._writer = await asyncio.open_connection(*self._address)
            self._writer.write("".join(f"take {key}\n" for key in self._unsent).encode("ascii"))
            while line := await reader.readline():
                verdict, _, key = line.decode("ascii").strip().partition(" ")
                answer = self._answers.get(key)
                if answer is not None and not answer.done():
                    answer.set_result(verdict == "ok")
        except (OSError, ValueError) as error:
            cause = str(error)
        finally:
            self.lost = True
            if self._writer is not None:
                self._writer.close()
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(PeerGone(f"{self._address[0]}:{self._address[1]}: {cause}"))
