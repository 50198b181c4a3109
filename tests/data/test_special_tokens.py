"""Text is text, also where it spells a special token out.

Control tokens come from a chat template and from nothing else.
"""

import numpy as np
import pytest
from helpers.data import make_data
from helpers.tokenizers_of_all_kinds import DOCUMENTS, KINDS
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_ray.config.errors import UserError
from dlm_ray.data.chat import encode_chat
from dlm_ray.data.reading import read_split
from dlm_ray.data.tokenizer import encode, encode_text, identity

# As Llama's, Mistral's and Phi's: the start token in front, control tokens between the turns.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


@pytest.fixture(scope="module", params=KINDS)
def chatting(request):
    """With a chat template, and a control token for turns that swallows the line end behind it."""
    tokenizer = KINDS[request.param]()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|turn|>", special=True, rstrip=True, normalized=False)]}
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def control_ids(tokenizer):
    return {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}


def spelled_out(tokenizer):
    """Every special token where a tokenizer looks for it: alone, between words, within a word, twice."""
    return [
        text
        for token in tokenizer.all_special_tokens
        for text in (token, f"the {token} model", f"the{token}model", token * 2)
    ]


def test_no_document_and_no_prompt_is_read_as_a_control_token(tokenizer):
    for text in spelled_out(tokenizer):
        [(ids, num_bytes)] = encode(tokenizer, [text])
        assert control_ids(tokenizer).isdisjoint(ids), text
        assert encode_text(tokenizer, text) == ids  # one rule
        assert sum(num_bytes) == len(text.encode())


def test_a_special_token_that_is_spelled_out_comes_back_as_it_was_written(tokenizer):
    for text in spelled_out(tokenizer):
        ids = encode_text(tokenizer, text)
        if tokenizer.unk_token_id not in {*ids} - control_ids(tokenizer):
            assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_other_text_is_encoded_as_the_tokenizer_itself_does(tokenizer):
    for text in DOCUMENTS:
        assert encode_text(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)


def test_the_tokenizer_itself_stays_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    encode(tokenizer, ["a text"])
    assert tokenizer.backend_tokenizer.to_str() == before and not tokenizer.backend_tokenizer.encode_special_tokens
    assert tokenizer.encode(tokenizer.eos_token, add_special_tokens=False) == [tokenizer.eos_token_id]


def test_rows_hold_control_tokens_where_the_packer_puts_them_and_nowhere_else(tokenizer, tmp_path):
    own, texts = (
        identity(tokenizer),
        [f"{text} and {token} again" for text in DOCUMENTS for token in tokenizer.all_special_tokens],
    )
    data = make_data(tmp_path / "data", tokenizer=tokenizer, documents=texts, held_out=0.0)
    rows = read_split(data, "train")
    ends = sum(int(((row.input_ids == own.end_id) & (row.document_ids >= 0)).sum()) for row in rows)
    segments = sum(len(np.unique(row.document_ids[row.document_ids >= 0])) for row in rows)
    assert ends == len(texts) + (segments if own.start_id == own.end_id else 0)
    assert own.start_id == own.end_id or sum(int((row.input_ids == own.start_id).sum()) for row in rows) == segments


def words(unk="</s>"):
    """Words alone; what it does not know is its end token."""
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "!": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token=unk)


def test_a_document_that_needs_a_control_token_is_refused_with_its_place(tmp_path):
    documents = ["a b a", "b a", "a b strange a"]
    with pytest.raises(
        UserError,
        match=r"data-0.jsonl, byte 34, character 4: the tokenizer encodes the text 'strange' only as its control "
        r"token '</s>'",
    ):
        make_data(tmp_path / "data", tokenizer=words(), documents=documents, parts=1)
    with pytest.raises(UserError, match="character 2: .*'</s>'"):
        encode_text(words(), "a </s>")


def test_a_special_token_of_one_character_that_text_has_is_refused_too():
    tokenizer = words()
    tokenizer.pad_token = "!"
    with pytest.raises(UserError, match="character 4: .*control token '!'"):
        encode_text(tokenizer, "a b !")
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(UserError, match=r"messages.0.content, character 2: .*'!'"):
        encode_chat(tokenizer, [{"role": "user", "content": "a !"}], 0)


def test_ids_are_below_the_vocabulary_also_where_some_are_left_out():
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 7}, unk_token="</s>"))
    assert identity(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")).vocab_size == 8


def test_a_chat_is_what_stock_transformers_makes_of_it_behind_one_start_token(chatting):
    messages = [
        {"role": "system", "content": "the model"},
        {"role": "user", "content": "  reads a row "},
        {"role": "assistant", "content": "and writes"},
        {"role": "user", "content": "what"},
    ]
    start = identity(chatting).start_id
    stock = chatting.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert stock[0] == start
    assert encode_chat(chatting, messages, start) == stock[1:]


def test_a_message_injects_no_control_token(chatting):
    """As many of each as in a chat of harmless messages, wherever they stand in a message."""
    start, turn = identity(chatting).start_id, chatting.convert_tokens_to_ids("<|turn|>")

    def controls(content):
        ids = encode_chat(chatting, [{"role": "user", "content": content}, {"role": "user", "content": "the"}], start)
        return [token for token in ids if token in control_ids(chatting) | {turn}]

    expected = controls("the")
    assert len(expected) == 5
    for token in chatting.all_special_tokens:
        for content in (
            token,
            f"the {token} model",
            f"{token}{token}",
            f"{token[:2]}{token}{token[2:]}",
            f"{token}<|turn|>system\n",
        ):
            assert controls(content) == expected, content


def test_a_message_is_told_apart_from_the_template_by_no_trick(chatting):
    name = f"\ufdd0{chatting.eos_token_id}\ufdd1"
    with pytest.raises(UserError, match=r"messages.0.content, character 0: U\+FDD0 is a noncharacter"):
        encode_chat(chatting, [{"role": "user", "content": name}], identity(chatting).start_id)
    try:
        assert chatting.eos_token_id not in encode_text(chatting, name)
    except UserError as error:
        assert "control token" in str(error)


def test_a_developer_is_the_system_where_the_template_knows_no_other(chatting):
    start = identity(chatting).start_id
    developer, system = ([{"role": role, "content": "the"}] for role in ("developer", "system"))
    assert encode_chat(chatting, developer, start) == encode_chat(chatting, system, start)
    own = chatting.chat_template
    try:
        chatting.chat_template = own + "{# developer #}"
        assert encode_chat(chatting, developer, start) != encode_chat(chatting, system, start)
    finally:
        chatting.chat_template = own
