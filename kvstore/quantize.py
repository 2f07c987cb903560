"""Symmetric int8 quantization of pages: groups of neighbouring values share a scale.

A page of n values becomes n/group scales (fp16), then n values (int8): ``value = scale * q``. The scale is the
group's largest absolute value over 127, so the error of a value is at most half its group's scale, and below 1e-5 in
any case (absmax quantization; Dettmers et al., LLM.int8(), 2022). Groups must not mix keys with values, whose ranges
differ: on GPUs a token's ``[K | V]`` lie side by side, on CPUs K and V of a block are halves packed in tiles, and in
both a group that divides the head size stays within one of them.

All loops are torch's, over pieces small enough for the cache and for torch to stay on the calling thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]

GROUPS = (64, 32, 16)
_PIECE = 32768 - 64
"""Values at once: from 32,768 on torch spreads operations over its OpenMP threads, which the engine needs."""
_SMALLEST = 2.0**-24
"""Smallest positive fp16, so that no division by zero is."""
_LARGEST = 65504.0
_TYPES = {"bf16": "bfloat16", "fp16": "float16"}


def group_size(head_sizes: Sequence[int]) -> int | None:
    """Values of a group for a model with heads of these sizes; None if none fits and pages stay as they are."""
    common = math.gcd(*head_sizes)
    return next((group for group in GROUPS if common and common % group == 0), None)


def quantized_size(page_bytes: int, group: int) -> int:
    """Bytes of the quantized page; ``page_bytes`` of 16-bit values are whole groups."""
    values = page_bytes // 2
    return values + values // group * 2


def quantize(page: Bytes, dtype: str, group: int) -> Bytes | None:
    """Scales and values of a page of ``bf16`` or ``fp16``; None if it holds what int8 cannot express (not finite)."""
    import torch

    values = _typed(torch.from_numpy(page), dtype)
    count = values.numel()
    out = np.empty(quantized_size(page.size, group), np.uint8)
    whole = torch.from_numpy(out)
    scales = whole[: count // group * 2].view(torch.float16)
    quantized = whole[count // group * 2 :].view(torch.int8)
    work = torch.empty((_PIECE // group, group))
    for start in range(0, count, _PIECE):
        end = min(start + _PIECE, count)
        piece = work[: (end - start) // group]
        piece.copy_(values[start:end].view(-1, group))
        largest = piece.abs().amax(1).mul_(1 / 127)
        if not bool((largest <= _LARGEST).all()):
            return None
        scale = scales[start // group : end // group]
        scale.copy_(largest)
        inverse = scale.float().clamp_(min=_SMALLEST).reciprocal_()
        piece.mul_(inverse[:, None]).round_().clamp_(-127, 127)
        quantized[start:end].view(-1, group).copy_(piece)
    return out


def dequantize(data: Bytes, page: Bytes, dtype: str, group: int) -> None:
    """Write the page of ``quantize``'s ``data`` into ``page``. Raises ``ValueError`` if the sizes do not fit."""
    import torch

    if data.size != quantized_size(page.size, group):
        raise ValueError(f"{data.size} bytes are not the quantized form of a page of {page.size}")
    values = _typed(torch.from_numpy(page), dtype)
    count = values.numel()
    whole = torch.from_numpy(data)
    scales = whole[: count // group * 2].view(torch.float16)
    quantized = whole[count // group * 2 :].view(torch.int8)
    for start in range(0, count, _PIECE):
        end = min(start + _PIECE, count)
        piece = quantized[start:end].view(-1, group).float()
        piece.mul_(scales[start // group : end // group].float()[:, None])
        values[start:end].view(-1, group).copy_(piece)


def _typed(page: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return page.view(getattr(torch, _TYPES[dtype]))
