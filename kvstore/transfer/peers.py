"""The other ends that a mover knows: which engines reach each, and what was measured to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from llmserve.kvstore.transfer.base import TransferEngine, TransferError
from llmserve.kvstore.transfer.calls import Call
from llmserve.kvstore.transfer.ladder import Ladder, Rung, rungs
from llmserve.kvstore.transfer.orders import Ends

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Peer:
    """One other end."""

    ends: Ends
    engines: list[str]
    """Those that both ends have and that may reach it."""
    ladder: Ladder
    names: dict[str, str] = field(default_factory=dict)
    """Engine -> its name for the peer, of those that are connected."""
    wanted: bool = False
    """Pages were fetched from it: worth a probe."""


class Peers:
    """All other ends, connected as they are needed."""

    def __init__(self, engines: Mapping[str, TransferEngine]) -> None:
        self._engines = engines
        self._peers: dict[str, Peer] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def of(self, ends: Ends) -> Peer:
        """The peer that described itself so."""
        peer = self._peers.get(ends.mover)
        if peer is None:
            said = ends.engines
            common = [n for n, engine in self._engines.items() if n in said and engine.may_reach(said[n])]
            peer = self._peers[ends.mover] = Peer(ends, common, Ladder(rungs(common)))
        return peer

    def rates(self, mover: str) -> dict[Rung, float]:
        """Measured bytes a second to that mover."""
        peer = self._peers.get(mover)
        return peer.ladder.rates() if peer is not None else {}

    def connected(self, peer: Peer, engine: str) -> str:
        """The engine's name for the peer. Raises ``TransferError``."""
        if engine not in peer.names:
            peer.names[engine] = self._engines[engine].connect(peer.ends.engines[engine])
        return peer.names[engine]

    def forget(self, peer: Peer, engine: str) -> None:
        """Connect anew before the engine's next use for that peer."""
        if name := peer.names.pop(engine, None):
            self._engines[engine].forget(name)

    def reachable(self, peer: Peer) -> bool:
        """False: by no engine, so that nothing more of it can arrive."""
        return any(self._engines[engine].reachable(name) for engine, name in peer.names.items())

    def say(self, peer: Peer, call: Call) -> bool:
        """By the first engine that reaches the peer; False: none does."""
        for name in peer.engines:
            try:
                self._engines[name].notify(self.connected(peer, name), msgspec.msgpack.encode(call))
                return True
            except TransferError as error:
                logger.info("%s cannot notify %s: %s", name, peer.ends.mover[:8], error)
                self.forget(peer, name)
        logger.warning("mover %s hears nothing from this one any more", peer.ends.mover[:8])
        return False
