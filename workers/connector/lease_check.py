"""Whether producers on this host still hold a lease: read from their memory, by the engine core itself."""

from __future__ import annotations

import logging

from llmserve.kvstore.transfer import SAME_HOST
from llmserve.kvstore.transfer.base import EngineOptions, Run, TransferError
from llmserve.kvstore.transfer.same_host import SameHostEngine
from llmserve.workers.connector.leases import SLOT_BYTES, LeaseTable
from llmserve.workers.connector.wire import Handoff, RankPages, WireError, decode_rank

logger = logging.getLogger("vllm.llmserve.connector")


class LeaseCheck:
    """A look takes some ten microseconds."""

    def __init__(self, fingerprint: str) -> None:
        """Raises ``TransferError`` where memory of other processes cannot be read."""
        self._engine = SameHostEngine(EngineOptions(fingerprint=fingerprint))
        self._found = LeaseTable(1)
        self._peers: dict[tuple[str, str], tuple[str, RankPages]] = {}
        """(engine id, rank) -> its name in the engine, and where its table lies."""

    def stands(self, handoff: Handoff) -> bool:
        """Whether the slot holds the handoff's token on all ranks; never raises."""
        try:
            return all(self._token(handoff, rank) == handoff.token for rank in handoff.ranks)
        except (TransferError, WireError) as error:
            logger.info("the lease of %s cannot be looked at: %s", handoff.request, error)
            for rank in handoff.ranks:
                known = self._peers.pop((handoff.engine_id, rank), None)
                if known is not None:
                    self._engine.forget(known[0])
            return False

    def _token(self, handoff: Handoff, rank: str) -> int:
        key = (handoff.engine_id, rank)
        if key not in self._peers:
            pages = decode_rank(handoff.ranks[rank])
            said = pages.ends.engines.get(SAME_HOST)
            if said is None:
                raise WireError(f"rank {rank} has no engine for this host")
            self._peers[key] = self._engine.connect(said), pages
        name, pages = self._peers[key]
        self._engine.peek(name, Run(self._found.address, pages.table + handoff.slot * SLOT_BYTES, SLOT_BYTES))
        return self._found.value(0)

    def close(self) -> None:
        self._engine.close()
