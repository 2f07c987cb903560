"""``llmserve apply`` says what would start, or what is wrong: exit code 0 or 2, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmserve.cli.main import main
from tests.manifests.samples import SHIPPED, small


def _apply(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[int, str, str]:
    code = main(["apply", "-f", str(path)])
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,'
        ' "max_position_embeddings": 8192, "dtype": "bfloat16"}'
    )
    return folder


def _written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return path


def test_a_good_manifest_shows_its_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    code, out, err = _apply(
        capsys, _written(tmp_path, small("kv_cache: {page_size_kb: 700}", f"id: {model}, dtype: bf16"))
    )
    assert (code, err) == (0, "")
    assert "KV block         32 tokens, 720 KB a page on each rank (700 KB asked for, 720 KB is nearest" in out
    for heading in ("prefill", "decode", "budgets", "tiers", "transfer engines, in order", "memory"):
        assert heading in out


def test_the_example_shows_its_plan_then_the_missing_feature(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEY", raising=False)
    code, out, err = _apply(capsys, SHIPPED / "llmserve.yaml")
    assert code == 2
    assert "transfer engines, in order" in out
    assert "environment variable API_KEY is not set (spec.security.api_keys[0])" in out
    assert len(err.splitlines()) == 1
    assert all(line.startswith("not supported yet: spec.") for line in err.splitlines())


def test_a_wrong_manifest_is_only_its_problems(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = _apply(capsys, _written(tmp_path, small("gateway: {prot: 1}, bus: {sync: no}")))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2


def test_a_local_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = _apply(capsys, _written(tmp_path, small(primary="id: ./nowhere")))
    assert (code, out, err) == (2, "", "model folder './nowhere' does not exist\n")


@pytest.mark.parametrize("arguments", [[], ["apply"], ["bench"], ["aply", "-f", "x"], ["apply", "-f", "x", "y"]])
def test_wrong_usage_exits_with_two(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: llmserve" in capsys.readouterr().err


def test_apply_imports_neither_vllm_nor_torch_nor_the_other_commands() -> None:
    code = (
        "import sys; from llmserve.cli.main import main; main(['apply', '-f', 'none']); "
        "sys.exit(bool({'vllm', 'torch', 'nats', 'llmserve.cli.up'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path: Path, model: Path) -> None:
    path = _written(tmp_path, small(primary=f"id: {model}"))
    command = f"{sys.executable} -m llmserve.cli.main apply -f {path} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
