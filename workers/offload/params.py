"""What a request tells the tiers, in its ``kv_transfer_params``; the worker writes them, never the client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SPACE = "space"
"""Whose pages it may read and writes, see ``kvstore.keys``."""
NOBODY = ""
HOT_BYTES = "llmserve_hot_bytes"
"""In the connector's configuration: hot sets by space."""
_MAX_LOAD_TOKENS = "max_load_tokens"
_KEPT_TOKENS = "kept_tokens"
_COMPUTE_TOKENS_S = "compute_tokens_s"


def tier_params(space: str, handed_over: int = 0, compute_tokens_s: float = 0.0) -> dict[str, Any]:
    """``handed_over``: leading tokens whose pages come from a prefill worker, which keeps them too.
    ``compute_tokens_s``: how fast the engine computes prompts, 0 if that is not known yet."""
    params: dict[str, Any] = {SPACE: space, _COMPUTE_TOKENS_S: compute_tokens_s}
    return params | {_MAX_LOAD_TOKENS: 0, _KEPT_TOKENS: handed_over} if handed_over else params


def space_of_request(params: Mapping[str, Any] | None) -> str:
    """The space that the worker gave to the request; ``NOBODY`` if it gave none: nothing is read or written."""
    space = (params or {}).get(SPACE)
    return space if isinstance(space, str) else NOBODY


def kept_tokens(params: Mapping[str, Any] | None) -> int:
    """Leading tokens whose pages another worker keeps."""
    return int((params or {}).get(_KEPT_TOKENS, 0))


def page_compute_s(params: Mapping[str, Any] | None, page_tokens: int) -> float:
    """Seconds in which the engine computes a page; infinite while that is not known."""
    tokens_s = float((params or {}).get(_COMPUTE_TOKENS_S, 0.0))
    return page_tokens / tokens_s if tokens_s > 0 else math.inf
