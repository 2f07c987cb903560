"""Models are found, or converted once; the converted one talks."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve.manifests.models import (
    PACKAGED_ID,
    ModelError,
    ModelShape,
    make_once,
    model_shape,
    resolve_model,
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(resolve_model(PACKAGED_ID, tmp_path_factory.mktemp("cache")).path)


def test_the_packaged_model_has_the_shape_of_smollm2(converted: Path) -> None:
    shape = model_shape(converted)
    weights = (converted / "model.safetensors").stat().st_size
    assert shape == ModelShape(30, 3, 64, 2, max_position_embeddings=8192, weight_bytes=weights)


def test_a_second_look_finds_the_same_folder_without_the_converter(converted: Path) -> None:
    code = (
        "import pathlib, sys; from llmserve.manifests.models import resolve_model; "
        f"print(resolve_model({PACKAGED_ID!r}, pathlib.Path({str(converted.parent)!r})).path); "
        "sys.exit('gguf' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(converted)


@pytest.mark.parametrize("text", ["Hello, it's 12345 é漢字 🙂\n\n  x", "<|im_start|>user\nhi<|im_end|>\n", " a  b\t"])
def test_text_survives_the_tokenizer(converted: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_tokens_of_their_own_and_special_tokens_are_one(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("12345") == list("12345")
    assert tokenizer("<|im_start|><|im_end|>").input_ids == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_the_converted_model_knows_the_capital_of_france(converted: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def _fill_slowly(target: Path, log: Path) -> None:
    def write(folder: Path) -> None:
        with log.open("a") as file:
            file.write("x")
        (folder / "a").write_text("a")

    make_once(target, write)
    assert (target / "a").read_text() == "a"


def test_processes_that_race_make_the_folder_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    target, log = tmp_path / "deep" / "model", tmp_path / "log"
    processes = [context.Process(target=_fill_slowly, args=(target, log)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert log.read_text() == "x"


def test_a_folder_left_unfinished_is_made_anew(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("the disk is full")

    target = tmp_path / "model"
    with pytest.raises(OSError, match="the disk is full"):
        make_once(target, fail)
    assert not target.exists()
    make_once(target, lambda folder: None)
    assert list(target.iterdir()) == []


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = resolve_model(str(tmp_path))
    assert (files.path, files.local) == (str(tmp_path.resolve()), True)


def test_any_other_id_is_left_to_vllm() -> None:
    files = resolve_model("mistralai/Mistral-7B-Instruct")
    assert (files.path, files.local) == ("mistralai/Mistral-7B-Instruct", False)


@pytest.mark.parametrize("model_id", ["/no/such/folder", "./none", "a/b/c"])
def test_a_folder_that_is_not_there_is_one_line(model_id: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(model_id)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written to"):
        resolve_model(PACKAGED_ID, tmp_path / "file")


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"num_hidden_layers": "x"}', "\xff"])
def test_a_configuration_of_something_else_is_one_line(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json is not the configuration of a decoder model"):
        model_shape(tmp_path)


def test_fields_that_old_configurations_leave_out_are_derived(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    assert model_shape(tmp_path) == ModelShape(2, 4, 8, 4, 64)
