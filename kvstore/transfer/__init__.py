"""Page movers: NIXL now; ``make_engine`` walks the manifest's ladder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmserve.kvstore.transfer import nixl
from llmserve.kvstore.transfer.base import TransferEngine, TransferError

logger = logging.getLogger(__name__)

_NOT_BUILT = "not built yet"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to open an engine."""

    gpu: bool
    """The pages lie in GPU memory."""


@dataclass(frozen=True, slots=True)
class _Rung:
    available: Callable[[], str | None]
    open: Callable[[EngineOptions], TransferEngine]


def _open_nixl(options: EngineOptions) -> TransferEngine:
    return nixl.NixlEngine(progress_thread=options.gpu)


def _rungs() -> dict[str, _Rung]:
    return {"nixl": _Rung(nixl.available, _open_nixl)}


def unavailable(name: str) -> str | None:
    """None, or why the engine of that name cannot be used here."""
    rung = _rungs().get(name)
    return rung.available() if rung else _NOT_BUILT


def make_engine(order: Sequence[str], options: EngineOptions) -> TransferEngine:
    """The first engine of ``order`` that works here; each skipped one is logged with its reason.

    Raises ``TransferError`` if none does.
    """
    skipped: list[str] = []
    for name in order:
        reason = unavailable(name)
        if reason is None:
            try:
                return _rungs()[name].open(options)
            except TransferError as error:
                reason = str(error)
        logger.warning("transfer engine %s is skipped: %s", name, reason)
        skipped.append(f"{name}: {reason}")
    raise TransferError(f"transfer.engine_order {list(order)}: none is usable ({'; '.join(skipped)})")
