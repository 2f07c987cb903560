"""Runs work on an engine and collects what comes back."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import psutil

from llmserve.bus import frames
from llmserve.bus.messages import KvChange, Role, Stage
from llmserve.manifests.machine import probe_machine
from llmserve.manifests.models import resolve_model
from llmserve.manifests.schema import (
    Engine,
    KVCache,
    Manifest,
    Metadata,
    Models,
    PrimaryModel,
    Spec,
    Transfer,
)
from llmserve.manifests.sizes import Device
from llmserve.workers.engine.base import EngineInfo, EngineOutput, Offer, Work
from llmserve.workers.engine.base import Transfer as Moved
from llmserve.workers.engine.vllm import VllmEngine
from llmserve.workers.engine.vllm_config import Mode, VllmOptions
from tests.made_up import made_up_model

WAIT_S = 60.0
HbmDtype: TypeAlias = Literal["auto", "fp16", "bf16", "fp8"]


def manifest(
    *,
    model: Mapping[str, Any] | None = None,
    hbm_dtype: HbmDtype = "auto",
    prefix_caching: bool = False,
    kv_space_gb: float = 0.35,
    dram_gb: float | None = None,
    step_tokens: int | None = None,
    **transfer: Any,
) -> Manifest:
    """Small KV space, no prefix caching by default: what is computed shows. ``model`` replaces fields of the primary
    model."""
    return Manifest(
        metadata=Metadata(name="test"),
        spec=Spec(
            models=Models(
                primary=PrimaryModel(
                    **{"id": str(made_up_model()), "dtype": "fp32", "max_model_len": 2048, **(model or {})}
                ),
            ),
            engine=Engine(
                enforce_eager=True, kv_space_gb=kv_space_gb, max_num_seqs=16, max_num_batched_tokens=step_tokens
            ),
            kv_cache=KVCache(prefix_caching=prefix_caching, hbm_dtype=hbm_dtype, dram_gb=dram_gb),
            transfer=Transfer(**transfer),
        ),
    )


def body(prompt: list[int], max_tokens: int = 12, *, cache_salt: str | None = None, **params: Any) -> bytes:
    """A request as the gateway encodes it."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackEncoder

    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **params})
    request = EngineCoreRequest("theirs", prompt, None, sampling, None, 0.0, None, cache_salt, None)
    return frames.pack(MsgpackEncoder().encode(request))


@dataclass
class Collected:
    """All outputs of one piece of work."""

    outputs: list[EngineOutput]

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.tokens]

    @property
    def first(self) -> EngineOutput:
        return self.outputs[0]

    @property
    def last(self) -> EngineOutput:
        return self.outputs[-1]


@dataclass
class Driver:
    """An engine whose steps are read all the time."""

    engine: VllmEngine
    info: EngineInfo
    moved: list[Moved] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)
    kv: list[KvChange] = field(default_factory=list)
    tiers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """What happened at each storage class, summed."""
    released: set[str] = field(default_factory=set)
    died: Exception | None = None
    _outputs: dict[str, list[EngineOutput]] = field(default_factory=lambda: defaultdict(list))
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _task: asyncio.Task[None] | None = None
    _number: int = 0

    @classmethod
    async def open(cls, role: Role, mode: Mode, *, block_tokens: int | None = None, **fields: Any) -> Driver:
        """An engine of ``manifest(**fields)``."""
        return await cls.of(manifest(**fields), role, mode, block_tokens)

    @classmethod
    async def of(
        cls, made: Manifest, role: Role, mode: Mode, block_tokens: int | None = None, threads: int = 1
    ) -> Driver:
        files = resolve_model(made.spec.models.primary.id)
        on: Device = "cuda" if probe_machine().gpus else "cpu"
        options = VllmOptions(
            files.path, files.local, mode=mode, device=on, block_tokens=block_tokens, threads=threads
        )
        engine = VllmEngine(made, role, options)
        driver = cls(engine, await engine.start())
        driver._task = asyncio.create_task(driver._read())
        return driver

    async def _read(self) -> None:
        try:
            while True:
                step = await self.engine.step()
                for output in step.outputs:
                    self._outputs[output.work_id].append(output)
                self.moved.extend(step.transfers)
                self.offers.extend(step.offers)
                self.kv.extend(step.kv)
                self.released.update(step.released)
                for name, counts in step.tiers.items():
                    self.tiers[name].update({what: int(n) for what, n in counts.items()})
                async with self._changed:
                    self._changed.notify_all()
        except Exception as error:
            self.died = error
            async with self._changed:
                self._changed.notify_all()

    async def until(self, condition: Any, what: str) -> None:
        """Wait for ``condition()``; load changes without a step, so it is asked again at intervals too."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                async with self._changed:
                    try:
                        await asyncio.wait_for(self._changed.wait(), 0.05)
                    except TimeoutError:
                        continue
        assert condition(), what

    def submit(self, stage: Stage, data: bytes, work_id: str = "", **work: Any) -> str:
        self._number += 1
        work_id = work_id or f"{stage}{self._number}.0"
        self.engine.submit(Work(work_id, stage, data, **work))
        return work_id

    def outputs(self, work_id: str) -> list[EngineOutput]:
        return self._outputs[work_id]

    async def ended(self, work_id: str) -> Collected:
        """Wait for the last output, or the handoff."""
        outputs = self._outputs[work_id]
        await self.until(lambda: outputs and (outputs[-1].reason or outputs[-1].handoff), f"{work_id} ends")
        return Collected(outputs)

    async def run(self, stage: Stage, data: bytes, work_id: str = "", **work: Any) -> Collected:
        return await self.ended(self.submit(stage, data, work_id, **work))

    async def all_free(self) -> None:
        await self.until(lambda: self.engine.load().pages_free == self.info.pages_total, "all pages are free")

    async def close(self) -> None:
        await self.engine.close()
        if self._task is not None:
            await self._task


@dataclass
class Pair:
    """A prefill and a decode engine."""

    prefill: Driver
    decode: Driver

    async def decoded(self, data: bytes, first: Collected, *, whole_output: bool = False) -> Collected:
        """The decode after the prefill ``first``."""
        return await self.decode.run(
            Stage.DECODE,
            data,
            whole_output=whole_output,
            first_tokens=tuple(first.tokens),
            handoff=first.last.handoff,
        )

    async def whole(self, data: bytes) -> list[int]:
        """The reference: the same request on one engine."""
        return (await self.decode.run(Stage.WHOLE, data)).tokens


def engine_processes() -> set[psutil.Process]:
    """Those of all engines in child processes of this one."""
    return {p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name() + " ".join(p.cmdline())}
