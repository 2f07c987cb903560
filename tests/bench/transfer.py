"""How fast each engine moves pages between two processes, beside a plain copy in one: ``make bench-transfer``.

Pages of a small model on a CPU, or with ``--gpu`` of an 8B model on one GPU that both processes share; scattered over
the cache as after a while of serving, and neighbouring as in a fresh one. A sample of the pulled pages is compared.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llmserve.kvstore.transfer import open_engine
from llmserve.kvstore.transfer.base import EngineOptions, Place, Progress, Region, Run, TransferEngine, TransferError
from llmserve.kvstore.transfer.pages import Strip, byte_runs, page_runs

ENGINES = ("same_host", "nixl", "ucx", "nccl")
SECONDS = 40.0
"""For one transfer at most."""


@dataclass(frozen=True)
class Shape:
    """Of a KV cache."""

    layers: int
    page_bytes: int
    pages: int
    page_tokens: int
    tokens: tuple[int, ...]
    repeats: int


CPU = Shape(layers=30, page_bytes=98304, pages=128, page_tokens=128, tokens=(1024, 8192), repeats=7)
GPU = Shape(layers=32, page_bytes=65536, pages=4096, page_tokens=16, tokens=(1024, 8192, 32768), repeats=7)
JOINED = replace(GPU, layers=1, page_bytes=GPU.layers * GPU.page_bytes)
"""A page is one run of bytes over all layers, as the connector asks for on GPUs."""


class Cache:
    """A KV cache: layer by layer, as vLLM keeps it."""

    def __init__(self, shape: Shape, *, gpu: bool) -> None:
        self.shape, self.place = shape, Place(0 if gpu else None)
        words = shape.page_bytes // 8
        if gpu:
            import torch

            size = shape.layers * shape.pages * words
            self.data: Any = torch.arange(size, dtype=torch.int64, device="cuda").view(
                shape.layers, shape.pages, words
            )
            self.address = int(self.data.data_ptr())
        else:
            size = shape.layers * shape.pages * words
            self.data = np.arange(size, dtype=np.int64).reshape(shape.layers, shape.pages, words)
            self.address = int(self.data.ctypes.data)

    def clear(self) -> None:
        self.data[:] = -1
        self.settle()

    def settle(self) -> None:
        if self.place.gpu is not None:
            import torch

            torch.cuda.synchronize()

    def regions(self) -> list[Region]:
        size_bytes = self.shape.layers * self.shape.pages * self.shape.page_bytes
        return [Region(self.address, size_bytes, self.place)]

    def strips(self, address: int) -> list[Strip]:
        step = self.shape.pages * self.shape.page_bytes
        return [
            Strip(address + layer * step, self.shape.page_bytes, self.shape.page_bytes)
            for layer in range(self.shape.layers)
        ]

    def equals(self, here: Sequence[int], there: Sequence[int]) -> bool:
        """Whether the pages ``here`` hold what an untouched cache has at ``there``."""
        words = self.shape.page_bytes // 8
        for layer in (0, self.shape.layers - 1):
            for mine, theirs in list(zip(here, there, strict=True))[:: max(1, len(here) // 32)]:
                first = (layer * self.shape.pages + theirs) * words
                page = self.data[layer, mine]
                if int(page[0]) != first or int(page[-1]) != first + words - 1:
                    return False
        return True


class Hello(msgspec.Struct):
    descriptions: dict[str, bytes]
    address: int
    skipped: dict[str, str]


def open_all(cache: Cache) -> tuple[dict[str, TransferEngine], dict[str, str]]:
    engines: dict[str, TransferEngine] = {}
    skipped: dict[str, str] = {}
    for name in ENGINES:
        try:
            engine = open_engine(name, EngineOptions(gpu=cache.place.gpu))
            engine.register(cache.regions())
            engines[engine.name] = engine
        except TransferError as error:
            skipped[name] = str(error)
    return engines, skipped


def serve(shape: Shape, *, gpu: bool) -> None:
    """The other process: holds the pages, and drives its engines."""
    cache = Cache(shape, gpu=gpu)
    engines, skipped = open_all(cache)
    said = Hello({name: engine.describe() for name, engine in engines.items()}, cache.address, skipped)
    print(msgspec.json.encode(said).decode(), flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        for engine in engines.values():
            engine.notifications()
        time.sleep(0.00005 if any(engine.busy for engine in engines.values()) else 0.001)


def finish(engine: TransferEngine, handle: Any) -> bool:
    deadline_s = time.perf_counter() + SECONDS
    while (progress := engine.poll(handle)) is Progress.RUNNING and time.perf_counter() < deadline_s:
        time.sleep(0.00002)
    while not engine.release(handle):
        time.sleep(0.001)
    return progress is Progress.DONE


def page_lists(shape: Shape, tokens: int, pattern: str) -> tuple[list[int], list[int]]:
    count = tokens // shape.page_tokens
    if pattern == "neighbours":
        return list(range(shape.pages - count, shape.pages)), list(range(count))
    draw = random.Random(tokens)
    return draw.sample(range(shape.pages), count), draw.sample(range(shape.pages), count)


def copied(cache: Cache, source: int, runs: list[Run]) -> float:
    """Seconds of the same copy within this process."""
    if cache.place.gpu is None:
        begun_s = time.perf_counter()
        for run in runs:
            ctypes.memmove(run.local, run.remote, run.size_bytes)
        return time.perf_counter() - begun_s
    import torch

    count = sum(run.size_bytes for run in runs) // 8
    flat = cache.data.view(-1)
    half = flat.numel() // 2
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    flat[half : half + count].copy_(flat[:count])
    torch.cuda.synchronize()
    return time.perf_counter() - begun_s


def measure(cache: Cache, peer: Hello) -> Iterator[tuple[str, float, str]]:
    """(figure, GB/s, note)."""
    shape = cache.shape
    engines, skipped = open_all(cache)
    names: dict[str, str] = {}
    for name, engine in engines.items():
        if name not in peer.descriptions:
            continue
        try:
            names[name] = engine.connect(peer.descriptions[name])
        except TransferError as error:
            skipped[name] = str(error)
    for name, reason in {**peer.skipped, **skipped}.items():
        yield name, 0.0, reason
    spare = None if cache.place.gpu is not None else np.ones_like(cache.data)
    for tokens in shape.tokens:
        for pattern in ("scattered", "neighbours"):
            here, there = page_lists(shape, tokens, pattern)
            pairs = page_runs(here, there)
            runs = byte_runs(pairs, cache.strips(cache.address), cache.strips(peer.address))
            size_bytes = sum(run.size_bytes for run in runs)
            tag = f"{tokens}_{pattern}"
            source = cache.address if spare is None else int(spare.ctypes.data)
            own = list(byte_runs(pairs, cache.strips(cache.address), cache.strips(source)))
            seconds = min(copied(cache, source, own) for _ in range(shape.repeats))
            yield f"copy_{tag}", size_bytes / seconds / 1e9, "within one process"
            for name, engine in engines.items():
                if name not in names:
                    continue
                for way in ("pull", "push"):
                    speed, note = timed(cache, engine, names[name], way, runs, here, there)
                    yield f"{name}_{way}_{tag}", speed, note
    for engine in engines.values():
        engine.close()


def timed(
    cache: Cache, engine: TransferEngine, peer: str, way: str, runs: Sequence[Run], here: list[int], there: list[int]
) -> tuple[float, str]:
    """(GB/s: the median, note)."""
    size_bytes, seconds = sum(run.size_bytes for run in runs), []
    started_s = time.perf_counter()
    if way == "push":
        # What lies there may be overwritten by itself only: it is read again for the comparison.
        finish(engine, engine.pull(peer, runs, cache.place, cache.place))
    else:
        cache.clear()
    for repeat in range(cache.shape.repeats):
        begun_s = time.perf_counter()
        try:
            handle = (engine.pull if way == "pull" else engine.push)(peer, runs, cache.place, cache.place)
        except TransferError as error:
            return 0.0, str(error)
        if not finish(engine, handle):
            return 0.0, "failed"
        if repeat:
            seconds.append(time.perf_counter() - begun_s)
        if time.perf_counter() - started_s > SECONDS / 4 and seconds:
            break
    if not cache.equals(here, there):
        return 0.0, "WRONG BYTES"
    return size_bytes / statistics.median(
        seconds
    ) / 1e9, f"{len(runs)} runs, {statistics.median(seconds) * 1e3:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--peer-gpu", help="the other process's, as CUDA_VISIBLE_DEVICES names it")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--joined", action="store_true", help="with --gpu: a page is one run over all layers")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="build/bench/transfer.json")
    options = parser.parse_args()
    shape = (JOINED if options.joined else GPU) if options.gpu else CPU
    shape = replace(shape, tokens=tuple(options.tokens or shape.tokens))
    if options.serve:
        serve(shape, gpu=options.gpu)
        return
    command = [sys.executable, "-m", "tests.bench.transfer", "--serve", *sys.argv[1:]]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": options.peer_gpu} if options.peer_gpu else {})
    other = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=environment)
    figures: dict[str, float] = {}
    try:
        assert other.stdout is not None
        peer = msgspec.json.decode(next(line for line in other.stdout if line.startswith(b"{")), type=Hello)
        cache = Cache(shape, gpu=options.gpu)
        for name, speed, note in measure(cache, peer):
            print(f"{name:36} {speed:9.2f} GB/s  {note}", flush=True)
            figures[f"{name}_gb_s"] = round(speed, 3)
    finally:
        other.kill()
        other.wait()
    tag = "8192_scattered"
    figures["same_host_over_memcpy"] = round(figures[f"same_host_pull_{tag}_gb_s"] / figures[f"copy_{tag}_gb_s"], 3)
    print(f"same_host_over_memcpy {figures['same_host_over_memcpy']}")
    path = Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
