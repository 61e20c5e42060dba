"""The tokenizer: any text comes back, one token per byte."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sglang_dsv4.tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS, VOCAB_SIZE, build_tokenizer, byte_id

TOKENIZER = build_tokenizer()
AWKWARD = [
    "",
    " ",
    "  two  spaces ",
    "\r\n\t\x00\x7f",
    "é e\u0301",
    "\U0001f389👩‍👩‍👧",
    "\u202eright to left",
    "\ufeff\ufffd",
    "Ġ",
]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@given(st.text())
def test_any_text_comes_back(text: str):
    ids = ids_of(TOKENIZER, text)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.text(st.characters(exclude_characters="<｜")))
def test_one_token_per_byte(text: str):
    assert ids_of(TOKENIZER, text) == [byte_id(byte) for byte in text.encode()]


@pytest.mark.parametrize("token_id", range(len(SPECIAL_TOKENS)))
def test_special_tokens_are_one_token(token_id: int):
    assert ids_of(TOKENIZER, f"a{SPECIAL_TOKENS[token_id]}b") == [byte_id(97), token_id, byte_id(98)]


def test_part_of_a_character_is_not_an_error():
    assert TOKENIZER.decode([byte_id(0xE2), byte_id(0x82)]) == "\ufffd"


@pytest.mark.parametrize("load", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_loads_it(checkpoint: Path, load: type):
    tokenizer = load.from_pretrained(checkpoint)
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
    for text in [*AWKWARD, "".join(SPECIAL_TOKENS)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("né") == [byte_id(byte) for byte in "né".encode()]


def test_chat_template(checkpoint: Path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<｜begin▁of▁sentence｜>S<｜User｜>U<｜Assistant｜></think>A<｜end▁of▁sentence｜><｜User｜>V<｜Assistant｜></think>"
    )
