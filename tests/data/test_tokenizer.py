"""Byte counts are exact for any text, and an identity follows the content."""

import pytest
from helpers.data import make_documents
from tokenizers import Tokenizer

from dlm_ray.config.errors import UserError
from dlm_ray.data.tokenizer import encode, identity, load_tokenizer, train_tokenizer

NASTY = [
    "plain ascii",
    "tabs\tand\r\nline ends\n\n\n",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈 and combining é ä",
    "日本語のテキスト、中文字符",
    "a special token <|endoftext|> inside a text",
    "   leading and trailing   ",
    "\x00\x01 control",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_documents(), 400)


@pytest.mark.parametrize("text", NASTY)
def test_bytes_sum_to_the_utf8_length_and_the_text_comes_back(tokenizer, text):
    [(ids, num_bytes)] = encode(tokenizer, [text])
    assert sum(num_bytes) == len(text.encode())
    assert len(ids) == len(num_bytes)
    assert tokenizer.decode(ids) == text


def test_the_text_of_a_special_token_is_text(tokenizer):
    [(ids, _)] = encode(tokenizer, ["<|endoftext|>"])
    assert tokenizer.eos_token_id not in ids


def test_a_truncation_and_a_padding_in_the_tokenizer_change_nothing(tokenizer, tmp_path):
    text = " ".join(make_documents(3))
    [expected] = encode(tokenizer, [text])
    tokenizer.save_pretrained(str(tmp_path))
    limited = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    limited.enable_truncation(16)
    limited.enable_padding(length=10_000)
    limited.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(str(tmp_path)), [text]) == [expected]


def test_the_identity_is_the_content_not_the_place(tokenizer, tmp_path):
    for place in ("a", "b"):
        tokenizer.save_pretrained(str(tmp_path / place))
    one, two = (identity(load_tokenizer(str(tmp_path / place))) for place in ("a", "b"))
    assert one.sha256 == two.sha256 and one.name == "a"
    assert identity(train_tokenizer(make_documents(), 350)).sha256 != one.sha256


def test_training_is_deterministic():
    assert (
        identity(train_tokenizer(make_documents(), 400)).sha256
        == identity(train_tokenizer(make_documents(), 400)).sha256
    )


def test_bad_names_and_sizes_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="257 or more"):
        train_tokenizer(["a"], 100)
