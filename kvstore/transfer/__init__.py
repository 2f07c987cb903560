"""Page movers behind one interface: the same host's own, NIXL, UCX, and NCCL or gloo."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmserve.kvstore.transfer import collective, nixl, same_host, ucx
from llmserve.kvstore.transfer.base import EngineOptions, TransferEngine, TransferError

logger = logging.getLogger(__name__)

SAME_HOST = "same_host"
"""Goes before all others unless ``transfer.same_host`` is false; ``transfer.engine_order`` does not name it."""


@dataclass(frozen=True, slots=True)
class _Rung:
    available: Callable[[], str | None]
    open: Callable[[EngineOptions], TransferEngine]


def _rungs(*, gpu: bool) -> dict[str, _Rung]:
    return {
        SAME_HOST: _Rung(same_host.available, same_host.SameHostEngine),
        "nixl": _Rung(nixl.available, nixl.NixlEngine),
        "ucx": _Rung(ucx.available, ucx.UcxEngine),
        "nccl": _Rung(lambda: collective.available(gpu=gpu), collective.CollectiveEngine),
    }


def unavailable(name: str, *, gpu: bool = False) -> str | None:
    """None, or why the engine of that name cannot be used here. May import its library."""
    return _rungs(gpu=gpu)[name].available()


def open_engine(name: str, options: EngineOptions) -> TransferEngine:
    """Raises ``TransferError`` with the reason if it cannot be used here."""
    rung = _rungs(gpu=options.gpu is not None)[name]
    if reason := rung.available():
        raise TransferError(reason)
    return rung.open(options)


def open_ladder(order: Sequence[str], options: EngineOptions) -> tuple[list[TransferEngine], dict[str, str]]:
    """(the engines of ``order`` that work here; why each other one does not).

    Raises ``TransferError`` if none does.
    """
    engines: list[TransferEngine] = []
    skipped: dict[str, str] = {}
    for name in order:
        try:
            engines.append(open_engine(name, options))
        except TransferError as error:
            logger.warning("transfer engine %s is skipped: %s", name, error)
            skipped[name] = str(error)
    if not engines:
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise TransferError(f"transfer.engine_order {list(order)}: none is usable ({why})")
    return engines, skipped
