"""What ``make bench`` writes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.bench.path import save


def test_one_part_keeps_the_figures_of_the_other(tmp_path: Path) -> None:
    target = tmp_path / "bench" / "path.json"
    save(target, {"ttft_ratio": 1.0, "old": 1.0}, keep=False)
    save(target, {"ttft_ratio": 0.98765, "sim_requests_per_s_floor": 361.0}, keep=True)
    assert json.loads(target.read_text()) == {"ttft_ratio": 0.9877, "old": 1.0, "sim_requests_per_s_floor": 361.0}


def test_a_whole_run_replaces_all(tmp_path: Path) -> None:
    target = tmp_path / "path.json"
    save(target, {"old": 1.0}, keep=True)
    save(target, {"new": 2.0}, keep=False)
    assert json.loads(target.read_text()) == {"new": 2.0}
