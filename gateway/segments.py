"""Token ids of what lies between a prompt's special tokens, kept for the next prompt.

The system message of an application and the earlier turns of a chat come again and again. A byte-level BPE tokenizer
cuts a text at its special tokens first and looks at nothing beyond a cut, so that the ids of a piece are the same in
every prompt.
"""

from __future__ import annotations

import json
import re
from typing import Any

_KEPT_CHARS = 2_000_000
"""Of all pieces together; their ids take about as many bytes again."""
_PIECE_CHARS = 64
"""Shorter ones are not worth a place."""


class Segments:
    """The tokenizer of a prompt's text, with a memory of pieces, those used last first."""

    def __init__(self, core: Any) -> None:
        """``core``: of ``tokenizers``; see ``cuts_cleanly``."""
        ids = {token.content: token_id for token_id, token in core.get_added_tokens_decoder().items()}
        # The leftmost and there the longest one, as the tokenizer finds them.
        names = sorted(ids, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, names))})").split
        self._special = {name: [token_id] for name, token_id in ids.items()}
        self._encode = core.encode_batch_fast
        self._kept: dict[str, list[int]] = {}
        self._kept_chars = 0

    def encode(self, text: str) -> list[int]:
        """What the tokenizer makes of it, without the special tokens that it may add at its ends."""
        pieces = self._split(text)
        found = [self._find(piece) for piece in pieces]
        missing = [piece for piece, ids in zip(pieces, found, strict=True) if ids is None]
        made = iter(self._encode(missing, add_special_tokens=False) if missing else ())
        token_ids: list[int] = []
        for piece, ids in zip(pieces, found, strict=True):
            if ids is None:
                ids = next(made).ids
                self._keep(piece, ids)
            token_ids += ids
        return token_ids

    def _find(self, piece: str) -> list[int] | None:
        if not piece:
            return []
        special = self._special.get(piece)
        if special is not None:
            return special
        ids = self._kept.pop(piece, None)
        if ids is not None:
            self._kept[piece] = ids
        return ids

    def _keep(self, piece: str, ids: list[int]) -> None:
        if len(piece) < _PIECE_CHARS or piece in self._kept:
            return
        self._kept[piece] = ids
        self._kept_chars += len(piece)
        while self._kept_chars > _KEPT_CHARS:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._kept_chars -= len(oldest)


def cuts_cleanly(core: Any) -> bool:
    """Whether nothing but a special token itself decides where a text is cut, and what lies between two of them is
    the same wherever it stands."""
    model: dict[str, Any] = json.loads(core.to_str())
    clean = [
        not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        for token in core.get_added_tokens_decoder().values()
    ]
    parts = model["pre_tokenizer"] or {"type": ""}
    steps = parts["pretokenizers"] if parts["type"] == "Sequence" else [parts]
    return (
        model["model"]["type"] == "BPE"
        and model["normalizer"] is None
        and bool(clean)
        and all(clean)
        and not core.encode_special_tokens
        and all(step["type"] in ("Digits", "Split", "ByteLevel") for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
    )
