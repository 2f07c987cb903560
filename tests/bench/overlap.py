"""What it gains that pages move while their prompt is computed: prefill done to second token, with and without.

Two engines on the CPU of one host, a prompt of 1,536 tokens computed in chunks. Writes ``build/bench/overlap.json``.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path

from llmserve.bus.messages import Role, Stage
from llmserve.manifests.models import PACKAGED_ID
from tests.workers.engine_vllm.driver import Driver, body

TOKENS, STEP, PAGE = 1536, 256, 32
REPEATS = 5


async def handoff(prefill: Driver, decode: Driver, data: bytes, work_id: str, *, ahead: bool) -> tuple[float, float]:
    """(seconds from the submission to the first token, from there to the second)."""
    prefill.offers.clear()
    begun_s = time.perf_counter()
    prefill.submit(Stage.PREFILL, data, work_id)
    outputs = prefill.outputs(work_id)
    while not outputs:
        await prefill.until(lambda: outputs or prefill.offers, "something happens")
        for offer in prefill.offers if ahead else ():
            decode.submit(Stage.DECODE, data, work_id, handoff=offer.handoff, ahead=True)
        prefill.offers.clear()
    first_s = time.perf_counter()
    first = outputs[-1]
    decode.submit(Stage.DECODE, data, work_id, first_tokens=tuple(first.tokens), handoff=first.handoff)
    rest = decode.outputs(work_id)
    await decode.until(lambda: rest, "the second token")
    second_s = time.perf_counter()
    await decode.ended(work_id)
    return first_s - begun_s, second_s - first_s


async def measure() -> dict[str, float]:
    prefill, decode = await asyncio.gather(
        *(
            Driver.open(
                role,
                "process",
                model={"id": PACKAGED_ID},
                block_tokens=PAGE,
                prefix_caching=True,
                step_tokens=STEP,
            )
            for role in (Role.PREFILL, Role.DECODE)
        )
    )
    figures: dict[str, float] = {}
    try:
        for ahead in (False, True):
            found = []
            for number in range(REPEATS):
                # A prompt of its own each time: what was prefilled before is in the caches.
                ids = [2 + (7919 * i * i + 104729 * i + 31 * number + 17 * ahead) % 40000 for i in range(TOKENS)]
                name = f"{'ahead' if ahead else 'end'}{number}.0"
                found.append(await handoff(prefill, decode, body(ids, 8), name, ahead=ahead))
                await decode.all_free()
            kind = "ahead" if ahead else "at_the_end"
            figures[f"{kind}_first_token_ms"] = round(statistics.median(f for f, _ in found[1:]) * 1e3, 1)
            figures[f"{kind}_second_token_ms"] = round(statistics.median(s for _, s in found[1:]) * 1e3, 1)
    finally:
        await asyncio.gather(prefill.close(), decode.close())
    return figures


async def main() -> None:
    figures = await measure()
    gain = figures["at_the_end_second_token_ms"] / figures["ahead_second_token_ms"]
    figures["second_token_gain"] = round(gain, 2)
    path = Path("build/bench/overlap.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
