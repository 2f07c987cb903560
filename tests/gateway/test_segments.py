"""A prompt whose pieces are known becomes the token ids that the tokenizer makes of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from llmserve.gateway import segments
from llmserve.gateway.segments import Segments, cuts_cleanly
from llmserve.manifests.models import PACKAGED_ID, resolve_model
from tests.gateway.test_inline import TEXTS


@pytest.fixture(scope="module")
def core() -> Any:
    return Tokenizer.from_file(str(Path(resolve_model(PACKAGED_ID).path) / "tokenizer.json"))


@pytest.fixture(scope="module")
def known(core: Any) -> Segments:
    return Segments(core)


def whole(core: Any, text: str) -> list[int]:
    ids: list[int] = core.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


PARTS = ["<|im_start|>", "<|im_end|>", "<|im_", "start|>", "<|endoftext|>", "\n", "  ", " a", "12", "'ll", "é", "🙂"]


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.sampled_from([*PARTS, *TEXTS]) | st.text(max_size=80), max_size=12))
def test_ids_are_those_of_the_whole_text_the_first_time_and_the_next(
    core: Any, known: Segments, pieces: list[str]
) -> None:
    text = "".join(pieces)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    for _ in range(2):
        assert known.encode(text) == whole(core, text)


def test_a_piece_is_encoded_once(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known, encoded = Segments(core), list[str]()
    encode = known._encode

    def listen(texts: list[str], **options: Any) -> Any:
        encoded.extend(texts)
        return encode(texts, **options)

    monkeypatch.setattr(known, "_encode", listen)
    system = f"system\n{'Be brief and kind. ' * 10}"
    for number in range(3):
        text = f"<|im_start|>{system}<|im_end|>\n<|im_start|>user\nQuestion {number}<|im_end|>\n"
        assert known.encode(text) == whole(core, text)
    assert encoded.count(system) == 1


def test_what_was_used_longest_ago_is_forgotten(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_KEPT_CHARS", 1000)
    known = Segments(core)
    for number in range(100):
        known.encode(f"{number} " + "x" * 97)
        known.encode("y" * 100)
        assert sum(map(len, known._kept)) == known._kept_chars <= 1000
    assert "y" * 100 in known._kept


def changed(core: Any, **parts: Any) -> Any:
    copy = Tokenizer.from_str(core.to_str())
    for name, value in parts.items():
        setattr(copy, name, value)
    return copy


def test_a_tokenizer_whose_pieces_depend_on_what_is_around_them_is_left_alone(core: Any) -> None:
    assert cuts_cleanly(core)
    assert not cuts_cleanly(changed(core, normalizer=normalizers.Prepend("_")))
    assert not cuts_cleanly(changed(core, pre_tokenizer=pre_tokenizers.Metaspace()))
    assert not cuts_cleanly(changed(core, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)))
    greedy = changed(core)
    greedy.add_special_tokens([AddedToken("<gap>", rstrip=True, normalized=False)])
    assert not cuts_cleanly(greedy)
    unigram = json.loads(core.to_str()) | {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}
    unigram["added_tokens"] = []
    assert not cuts_cleanly(Tokenizer.from_str(json.dumps(unigram)))
