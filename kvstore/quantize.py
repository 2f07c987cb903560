"""Symmetric int8 quantization of pages: groups of neighbouring values share a scale.

A page of n values becomes n/group scales (fp16), then n values (int8): ``value = scale * q``. The scale is the
group's largest absolute value over 127, so the error of a value is at most half its group's scale, and below 1e-5 in
any case (absmax quantization; Dettmers et al., LLM.int8(), 2022). Groups must not mix keys with values, whose ranges
differ: on GPUs a token's ``[K | V]`` lie side by side, on CPUs K and V of a block are halves packed in tiles, and in
both a group that divides the head size stays within one of them.

All loops are torch's, over pieces that fit into a core's cache and are few: between torch's operations this thread
needs the interpreter, which an engine's thread needs too. In a process with an engine only threads that
``keep_to_one_core`` may come here.
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
_PIECE = 262144
"""Values at once."""
_STEPS = 127
_ROUNDING = 1.5 * 2.0**23
"""Added to a small fp32, the low bits of the sum are those of the nearest integer, in two's complement."""
_SMALLEST = 2.0**-24
"""Smallest positive fp16, so that no division by zero is."""
_LARGEST = 65504.0
_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of a value, of the types that can be quantized."""


def group_size(head_sizes: Sequence[int]) -> int | None:
    """Values of a group for a model with heads of these sizes; None if none fits and pages stay as they are."""
    common = math.gcd(*head_sizes)
    return next((group for group in GROUPS if common and common % group == 0), None)


def quantized_size(page_bytes: int, dtype: str, group: int) -> int:
    """Bytes of the quantized page; ``page_bytes`` are whole groups."""
    values = page_bytes // WIDTHS[dtype]
    return values + values // group * 2


def quantize(page: Bytes, dtype: str, group: int) -> Bytes | None:
    """Scales and values of a page; None if it holds what int8 cannot express (not finite)."""
    import torch

    values = _typed(torch.from_numpy(page), dtype).view(-1, group)
    out = np.empty(quantized_size(page.size, dtype, group), np.uint8)
    whole, groups, rows = torch.from_numpy(out), len(values), _PIECE // group
    scales = whole[: groups * 2].view(torch.float16)
    quantized = whole[groups * 2 :].view(torch.int8).view(-1, group)
    largest = _largest(values, rows)
    if not bool((largest <= _LARGEST * _STEPS).all()):
        return None
    scales.copy_(largest * (1 / _STEPS))
    # Of groups so small that fp16 cannot tell their scales apart none may leave eight bits.
    inverse = torch.minimum(scales.float().clamp_(min=_SMALLEST).reciprocal_(), (_STEPS + 0.4) / largest)[:, None]
    wide = torch.empty((rows, group))
    array, bits = wide.numpy(), wide.view(torch.int32)
    for piece, factors, target in zip(values.split(rows), inverse.split(rows), quantized.split(rows), strict=True):
        if len(piece) < rows:
            wide = wide[: len(piece)]
            array, bits = wide.numpy(), wide.view(torch.int32)
        wide.copy_(piece).mul_(factors)
        # torch's own addition takes twice as long: it multiplies as well.
        np.add(array, _ROUNDING, array)
        target.copy_(bits)
    return out


def _largest(values: torch.Tensor, rows: int) -> torch.Tensor:
    """The largest absolute value of each group (fp32): without their signs, floats are in the order of their bits."""
    import torch

    integers = torch.int16 if values.element_size() == 2 else torch.int32
    largest = torch.empty(len(values), dtype=integers)
    positive = torch.empty((rows, values.shape[1]), dtype=values.dtype)
    bits = positive.view(integers)
    for piece, target in zip(values.split(rows), largest.split(rows), strict=True):
        if len(piece) < rows:
            positive = positive[: len(piece)]
            bits = positive.view(integers)
        torch.abs(piece, out=positive)
        torch.amax(bits, 1, out=target)
    return largest.view(values.dtype).float()


def dequantize(data: Bytes, page: Bytes, dtype: str, group: int) -> None:
    """Write the page of ``quantize``'s ``data`` into ``page``. Raises ``ValueError`` if the sizes do not fit."""
    import torch

    if data.size != quantized_size(page.size, dtype, group):
        raise ValueError(f"{data.size} bytes are not the quantized form of a page of {page.size}")
    values = _typed(torch.from_numpy(page), dtype).view(-1, group)
    groups, rows = len(values), _PIECE // group
    whole = torch.from_numpy(data)
    scales = whole[: groups * 2].view(torch.float16).float()[:, None]
    quantized = whole[groups * 2 :].view(torch.int8).view(-1, group)
    wide = torch.empty((rows, group))
    for piece, factors, target in zip(quantized.split(rows), scales.split(rows), values.split(rows), strict=True):
        wide = wide[: len(piece)]
        target.copy_(wide.copy_(piece).mul_(factors))


def _typed(page: torch.Tensor, dtype: str) -> torch.Tensor:
    import torch

    return page.view(getattr(torch, _TYPES[dtype]))
