"""From the engine core's outputs to ours. No I/O.

``extra`` of an output is vLLM's own ``EngineCoreOutput``: a gateway reads it with
``MsgpackDecoder(EngineCoreOutput).decode(frames.unpack(extra))``. Its ``request_id`` is the work id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from llmserve.bus import frames
from llmserve.bus.messages import Reason
from llmserve.workers.connector.wire import HANDOFF, decode_handoff, encode
from llmserve.workers.engine.base import EngineLoad, EngineOutput, Transfer, Work

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import SchedulerStats


@dataclass(slots=True)
class Entry:
    """One piece of work inside the engine core."""

    work_id: str
    holds: bool
    """Prefill whose pages are to be handed over."""
    whole_output: bool
    first_tokens: int
    """Tokens of the prompt that a prefill worker sampled."""
    cached_tokens: int | None
    """What the prefill worker found in its cache; None if it was not asked."""
    handed: Work | None = None
    """The work itself, until its first output shows that the pages of its handoff were good."""
    at_first: bool = True


class OutputReader:
    """Translates outputs; keeps nothing but its encoder."""

    def __init__(self) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        self._encoder = MsgpackEncoder()

    def read(self, output: EngineCoreOutput, entry: Entry) -> EngineOutput:
        """The output of ``entry``; changes ``output``."""
        loaded = _loaded(output, entry)
        computed, cached = self._prefilled(output, entry)
        data = (output.kv_transfer_params or {}).get(HANDOFF) if entry.holds else None
        if data is not None:
            return replace(self._handed_off(output, entry, data, computed, cached), loaded_tokens=loaded)
        reason, error = _reason(output)
        if entry.holds and reason is Reason.LENGTH:
            # Only its last token may end a prefill so, and that one would not have been asked to hold its pages.
            reason, error = Reason.ERROR, "the pages of the prefill could not be held"
        repeated = output.finish_reason is not None and str(output.finish_reason) == "repetition"
        return EngineOutput(
            work_id=entry.work_id,
            tokens=output.new_token_ids,
            reason=reason,
            stop_reason="repetition" if repeated else output.stop_reason,
            cached_tokens=cached,
            loaded_tokens=loaded,
            computed_tokens=computed,
            extra=self._extra(output, entry),
            error=error,
        )

    def _handed_off(
        self, output: EngineCoreOutput, entry: Entry, data: bytes, computed: int | None, cached: int | None
    ) -> EngineOutput:
        handoff = msgspec.structs.replace(decode_handoff(data), cached_tokens=cached or 0)
        output.finish_reason = None
        output.stop_reason = None
        return EngineOutput(
            work_id=entry.work_id,
            tokens=[] if entry.whole_output else output.new_token_ids,
            cached_tokens=cached,
            computed_tokens=computed,
            extra=b"" if entry.whole_output else self._extra(output, entry),
            handoff=encode(handoff),
            pages=sum(len(group) for group in handoff.pages),
        )

    @staticmethod
    def _prefilled(output: EngineCoreOutput, entry: Entry) -> tuple[int | None, int | None]:
        """(tokens of the prompt computed, tokens found in a cache), with the first output only."""
        stats = output.prefill_stats
        if not entry.at_first or stats is None:
            return None, None
        entry.at_first = False
        # With all tokens at hand vLLM computes the last one again, to sample from it.
        reused = min(stats.num_cached_tokens, stats.num_prompt_tokens - 1)
        computed = max(0, stats.num_prompt_tokens - reused - entry.first_tokens)
        cached = entry.cached_tokens if entry.cached_tokens is not None else stats.num_cached_tokens
        return computed, cached

    def _extra(self, output: EngineCoreOutput, entry: Entry) -> bytes:
        if output.new_logprobs is None and output.new_prompt_logprobs_tensors is None:
            return b""
        output.request_id = entry.work_id
        output.kv_transfer_params = None
        return encode_extra(output, self._encoder)


def _loaded(output: EngineCoreOutput, entry: Entry) -> int:
    """Prompt tokens that came from a tier; what a handoff brings is none."""
    stats = output.prefill_stats
    if not entry.at_first or stats is None or entry.cached_tokens is not None:
        return 0
    loaded: int = stats.num_external_cached_tokens
    return loaded


def encode_extra(output: EngineCoreOutput, encoder: Any = None) -> bytes:
    """All of vLLM's output in one buffer."""
    from vllm.v1.serial_utils import MsgpackEncoder

    return frames.pack((encoder or MsgpackEncoder()).encode(output))


def decode_extra(extra: bytes) -> EngineCoreOutput:
    """The output that ``encode_extra`` encoded. Raises ``ValueError``."""
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.serial_utils import MsgpackDecoder

    return MsgpackDecoder(EngineCoreOutput).decode(frames.unpack(extra))


def load_of(stats: SchedulerStats, pages_total: int) -> EngineLoad:
    """Where the engine stood when it made ``stats``."""
    free = round((1 - stats.kv_cache_usage) * pages_total)
    return EngineLoad(stats.num_running_reqs, stats.num_waiting_reqs + stats.num_skipped_waiting_reqs, free)


def transfers_of(stats: SchedulerStats) -> list[Transfer]:
    """Transfers of pages that ended in the step."""
    said = _stats_of(stats, "LLMServeConnector").get("transfers", ())
    return [
        Transfer(engine, direction, bytes_moved, seconds, failure, core_id.rpartition(".")[0])
        for engine, direction, bytes_moved, seconds, failure, core_id in said
    ]


def offers_of(stats: SchedulerStats) -> list[tuple[str, bytes]]:
    """(id in the core, encoded handoff) of prompts that are computed in part."""
    return [(core_id, data) for core_id, data in _stats_of(stats, "LLMServeConnector").get("ahead", ())]


def spoilt_of(stats: SchedulerStats) -> list[str]:
    """Ids in the core whose outputs of the step were computed with pages that were not valid."""
    return list(_stats_of(stats, "LLMServeConnector").get("spoilt", ()))


def tiers_of(stats: SchedulerStats) -> dict[str, dict[str, float]]:
    """By storage class, what happened there of late; see ``kvstore.tiers.TierStats``."""
    tiers: dict[str, dict[str, float]] = {}
    for name, values in _stats_of(stats, "TierConnector").get("data", {}).items():
        kind, _, rest = name.partition(":")
        if kind == "llmserve_tier":
            what, _, tier = rest.partition(":")
            tiers.setdefault(tier, {})[what] = sum(values.values())
    return tiers


def _stats_of(stats: SchedulerStats, connector: str) -> dict[str, Any]:
    """Statistics of one connector: of several vLLM puts each one's under its name."""
    data: dict[str, Any] = stats.kv_connector_stats or {}
    own = data.get(connector, data)
    return getattr(own, "data", own)  # type: ignore[no-any-return]


def released_of(stats: SchedulerStats) -> list[str]:
    """Ids in the core whose held pages became free in the step."""
    return list(_stats_of(stats, "LLMServeConnector").get("released", ()))


def _reason(output: EngineCoreOutput) -> tuple[Reason | None, str]:
    if output.finish_reason is None:
        return None, ""
    kind = str(output.finish_reason)
    if kind == "error":
        return Reason.ERROR, "the engine core ended the request with an error"
    return {"stop": Reason.STOP, "repetition": Reason.STOP, "length": Reason.LENGTH}.get(kind, Reason.CANCELLED), ""
