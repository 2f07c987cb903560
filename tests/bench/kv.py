"""``make bench-kv``: the KV cache below the engines' memory. Writes ``build/bench/kv.json``."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from tests.bench import kv_locality, kv_quality, kv_tiers
from tests.processes import ROOT

TARGETS = {
    "nvme_ttft_ratio": "at most 0.35",
    "s3_ttft_ratio": "at most 0.6",
    "trace_ttft_ratio": "at most 0.5",
    "no_reuse_ttft_ratio": "at most 1.05",
    "save_cost": "at most 0.03",
    "int8_bytes_ratio": "at most 0.5",
    "int8_agreement": "at least 0.97",
    "reindex_100k_pages_s": "below 10",
    "int8_quantize_gb_s": "at least 1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="one section: nvme, s3, save, quality, listing, reading or trace")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory(prefix="bench-kv-") as folder:
        figures = asyncio.run(kv_tiers.figures(Path(folder), only)) if only != "trace" else {}
        if only in ("", "quality"):
            figures |= asyncio.run(kv_quality.quality(Path(folder) / "quality"))
    if only in ("", "trace"):
        if kv_locality.TRACE.exists():
            figures |= kv_locality.figures()
        else:
            print(f"no trace: {kv_locality.TRACE} is not there; $LLMSERVE_TRACES names its folder")
    target = ROOT / "build" / "bench" / "kv.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    # A single section renews only its own figures.
    known = json.loads(target.read_text()) if only and target.exists() else {}
    target.write_text(json.dumps(known | figures, indent=2) + "\n")
    for name, value in figures.items():
        print(f"{name:28} {value:10.4f}  {TARGETS.get(name, '')}".rstrip())


if __name__ == "__main__":
    main()
