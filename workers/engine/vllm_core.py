"""Where the engine core runs, behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from llmserve.workers.engine.base import EngineInfo


class Unheard:
    """KV events that could not be taken in."""


if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVEventBatch
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

    Sink: TypeAlias = Callable[[EngineCoreOutputs | KVEventBatch | Unheard | Exception], None]
    """Called in the event loop with each step's outputs and KV events, and once with the exception that ended the
    core."""


@dataclass(frozen=True, slots=True)
class Pages:
    """What a started core says of its KV pages."""

    total: int
    """Without the one that vLLM keeps as a placeholder."""
    tokens: int
    size_bytes: int
    """Of one page over all layers and ranks."""
    fingerprint: str
    transports: str = ""
    """See ``EngineInfo.transports``."""


class Core(ABC):
    """One engine core; its methods are called from the event loop."""

    @abstractmethod
    async def start(self, sink: Sink) -> Pages:
        """Load the model. Raises ``EngineError``."""

    @abstractmethod
    def add(self, request: EngineCoreRequest) -> None: ...

    @abstractmethod
    def abort(self, core_ids: list[str]) -> None: ...

    @abstractmethod
    async def close(self) -> None:
        """End it within seconds; never raises."""


def pages_of(blocks: int, block_tokens: int, ranks: list[tuple[str, int, str]]) -> Pages:
    """From the answers of all ranks to ``llmserve_pages``."""
    fingerprint, _, transports = ranks[0]
    return Pages(blocks - 1, block_tokens, sum(size for _, size, _ in ranks), fingerprint, transports)


def refused(core_id: str) -> EngineCoreOutputs:
    """The output of a request that the core could not even queue."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    return EngineCoreOutputs(outputs=[EngineCoreOutput(core_id, [], finish_reason=FinishReason.ERROR)])


def info_of(config: VllmConfig, pages: Pages) -> EngineInfo:
    """What an engine says of itself once its core has started."""
    from vllm import __version__

    return EngineInfo(
        api=f"vllm-{__version__}",
        fingerprint=pages.fingerprint,
        max_model_len=config.model_config.max_model_len,
        slots=config.scheduler_config.max_num_seqs,
        step_tokens=config.scheduler_config.max_num_batched_tokens,
        pages_total=pages.total,
        page_tokens=pages.tokens,
        page_bytes=pages.size_bytes,
        transports=pages.transports,
    )
