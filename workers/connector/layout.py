"""Where an engine's pages lie, and the fingerprint of what is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmserve.kvstore.transfer.base import Place, Region
from llmserve.kvstore.transfer.pages import Strip

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


class LayoutError(ValueError):
    """The engine's KV caches cannot be handed over page by page."""


def in_order(names: Sequence[str]) -> list[str]:
    """Layers by number, those of a draft model apart: the same on every engine of the same models."""
    return sorted(names, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")])


def strip_of(name: str, cache: object, pages: int) -> Strip:
    """Where a layer's pages are; raises ``LayoutError`` unless each is one run of bytes."""
    import torch

    if not isinstance(cache, torch.Tensor):
        raise LayoutError(f"layer {name} keeps state that is no paged KV cache (a state-space model?)")
    if cache.shape[0] % pages or not cache[0].is_contiguous():
        raise LayoutError(f"a page of layer {name} is not one run of bytes: {tuple(cache.shape)}, {cache.stride()}")
    # The attention kernel's blocks may be smaller than the cache manager's pages.
    blocks = cache.shape[0] // pages
    block_bytes = cache[0].nbytes
    stride_bytes = cache.stride(0) * cache.element_size()
    if blocks > 1 and stride_bytes != block_bytes:
        raise LayoutError(f"a page of layer {name} is {blocks} blocks that do not touch")
    return Strip(cache.data_ptr(), stride_bytes * blocks, block_bytes * blocks)


def joined(strips: Sequence[Strip]) -> list[Strip]:
    """Layers whose parts of a page touch, as one strip: a page of all of them is then one run of bytes."""
    whole: list[Strip] = []
    for strip in strips:
        last = whole[-1] if whole else None
        if (
            last is not None
            and strip.base == last.base + last.page_bytes
            and strip.stride_bytes == last.stride_bytes >= last.page_bytes + strip.page_bytes
        ):
            whole[-1] = Strip(last.base, last.stride_bytes, last.page_bytes + strip.page_bytes)
        else:
            whole.append(strip)
    return whole


def regions_of(caches: Mapping[str, torch.Tensor], place: Place) -> list[Region]:
    """The memory behind the caches, each piece once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in caches.values()}
    return [Region(address, size_bytes, place) for address, size_bytes in storages.items()]


def fingerprint(config: VllmConfig, model_id: str, page_shape: Sequence[int], *, on_cpu: bool) -> str:
    """Names the content of a page: equal ones can be read by each other's attention kernels."""
    from vllm import __version__

    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    architecture = json.dumps(model.hf_text_config.to_dict(), sort_keys=True, default=str)
    parts = (
        __version__,
        model_id,
        str(model.revision),
        hashlib.sha256(architecture.encode()).hexdigest(),
        str(model.dtype),
        str(cache.cache_dtype),
        str(cache.kv_cache_layout),
        cache.block_size,
        tuple(page_shape),
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        _cpu_isa(config) if on_cpu else "",
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _cpu_isa(config: VllmConfig) -> str:
    # CPU attention packs K and V for the instruction set that it uses, AMX tiles for instance.
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model = config.model_config
    return str(_get_attn_isa(model.dtype, config.cache_config.block_size, model.get_head_size()))
