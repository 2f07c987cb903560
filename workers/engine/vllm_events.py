"""From vLLM's KV events to ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmserve.bus.block_hashes import pack_short
from llmserve.bus.messages import KvChange, Tier

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVEventBatch

_TIERS = {None: Tier.GPU, "GPU": Tier.GPU, "CPU": Tier.DRAM}
"""vLLM calls the memory that the model runs in GPU, on CPUs as well, and the pool of its offloading connector CPU.
What lies below is told by the kv role, whose files outlive the engine."""
_UNSAID = 0
"""vLLM's offloading names a page of DRAM by its hash, without size and tokens; it is one block there too. Its option
``self_describing_kv_events`` would add the tokens, which nobody reads, and not for pages that come from below."""
_FIRST_GROUP = (None, 0)
"""Models with several groups of layers store a block once for each; where one is, the others are."""


def changes_of(batch: KVEventBatch, block_tokens: int) -> list[KvChange]:
    """The changes in ``batch``, in its order, neighbouring ones together. Parts of blocks are left out."""
    from vllm.distributed.kv_events import BlockRemoved, BlockStored

    changes: list[KvChange] = []
    for event in batch.events:
        if isinstance(event, BlockStored):
            tier = _TIERS.get(event.medium)
            whole = event.block_size in (block_tokens, _UNSAID)
            if tier is not None and event.group_idx in _FIRST_GROUP and whole:
                _add(changes, tier, stored=pack_short(map(_short, event.block_hashes)))
        elif isinstance(event, BlockRemoved):
            tier = _TIERS.get(event.medium)
            if tier is not None and event.group_idx in _FIRST_GROUP:
                _add(changes, tier, removed=pack_short(map(_short, event.block_hashes)))
        else:
            changes.append(KvChange(Tier.GPU, cleared=True))
    return changes


def _add(changes: list[KvChange], tier: Tier, *, stored: bytes = b"", removed: bytes = b"") -> None:
    last = changes[-1] if changes else None
    # Within one change removals come first, so that nothing may be removed behind something stored.
    if last is not None and last.tier is tier and not last.cleared and not (removed and last.stored):
        changes[-1] = KvChange(tier, last.stored + stored, last.removed + removed)
    else:
        changes.append(KvChange(tier, stored, removed))


def _short(block_hash: int | bytes) -> int:
    """vLLM shortens hashes itself unless ``VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0``."""
    return block_hash if isinstance(block_hash, int) else int.from_bytes(block_hash[-8:], "big")
