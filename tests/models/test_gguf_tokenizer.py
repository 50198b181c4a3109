"""The tokenizer of a GGUF file returns the same ids as the tokenizer that the file was converted from."""

import pytest
from helpers.gguf_files import SHAPE, SPECIAL, TEMPLATE, random_network, train_bpe, write_gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Tokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.data.tokenizer import encode, identity, load_tokenizer

STRINGS = [
    "",
    " ",
    "The year 1984 isn't 2024; WE'LL see, I'VE been.",
    "naïve José, e\u0301 and é, Ångström, ½ ٣ ²",
    "  two  spaces   three\t\ttabs\n\n\nlines \r\n end  ",
    "def f(x):\n    return x+12345  # ok\n\n\nclass A:\r\n\tpass",
    "日本語と한국어 и русский, مرحبا",
    "emoji 👩‍👩‍👧 and 🇫🇷, control \x00\x07",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "a/b//c\\d $100 100% x1y22z333",
    "CamelCaseWords HTTPServer iPhone's DON'T",
]


@pytest.fixture(scope="module")
def network():
    return random_network(LlamaConfig(**SHAPE))


def splitting(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def tokenizer_like(pre_tokenizer, vocabulary, merges, **options):
    """A tokenizer.json as the models' repositories have it."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# Digits one by one, as in HuggingFaceTB/SmolLM2's tokenizer.json.
SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
LLAMA3 = splitting(TikTokenConverter().pattern)
TEKKEN = splitting(GGUF_PRE_TOKENIZER_SPLITS["tekken"])
ORIGINALS = {
    "gpt-2": lambda vocabulary, merges: GPT2Tokenizer(vocab=vocabulary, merges=merges),
    "qwen2": lambda vocabulary, merges: Qwen2Tokenizer(vocab=vocabulary, merges=merges),
    "smollm": lambda vocabulary, merges: tokenizer_like(SMOLLM, vocabulary, merges),
    "llama-bpe": lambda vocabulary, merges: tokenizer_like(LLAMA3, vocabulary, merges, ignore_merges=True),
    "tekken": lambda vocabulary, merges: tokenizer_like(TEKKEN, vocabulary, merges, ignore_merges=True),
}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_ids_and_texts_equal_those_of_the_original_tokenizer(pre, network, tmp_path):
    # Merges learned within pieces would hide how the text is split, so these are learned without splitting.
    bpe = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    original = ORIGINALS[pre](*bpe)
    original.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True, normalized=False) for token in SPECIAL]}
    )
    write_gguf(tmp_path / "tiny.gguf", network, pre=pre, bpe=bpe)
    ours = load_tokenizer(str(tmp_path / "tiny.gguf"))
    for text in STRINGS:
        expected = original(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == expected, text
        assert ours.decode(expected) == original.decode(expected)


def test_the_test_strings_distinguish_the_kinds(network, tmp_path):
    found = set()
    for pre in ORIGINALS:
        bpe = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        write_gguf(tmp_path / f"{pre}.gguf", network, pre=pre, bpe=bpe)
        found.add(str(load_tokenizer(str(tmp_path / f"{pre}.gguf"))(STRINGS, add_special_tokens=False).input_ids))
    assert len(found) == len(ORIGINALS)


@pytest.mark.parametrize(
    ("pre", "is_whole"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)]
)
def test_only_some_kinds_apply_merges_to_a_piece_that_is_a_token(pre, is_whole, network, tmp_path):
    vocabulary, merges = train_bpe()
    vocabulary |= {"qzx": len(vocabulary)}
    write_gguf(tmp_path / "tiny.gguf", network, pre=pre, bpe=(vocabulary, merges))
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    assert tokenizer.tokenize("qzx") == (["qzx"] if is_whole else ["q", "z", "x"])


def test_special_tokens_template_and_length_are_kept_and_vocabulary_padding_is_not(network, tmp_path):
    write_gguf(
        tmp_path / "tiny.gguf",
        network,
        metadata={"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 1},
    )
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert set(SPECIAL) <= set(tokenizer.all_special_tokens)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.model_max_length == 128
    assert len(tokenizer) == 299 and "[PAD299]" not in tokenizer.get_vocab()  # the network has 300 rows
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        == "<|im_start|>user\nHi<|im_end|>\n"
    )
    assert tokenizer.decode(tokenizer("<|im_start|>x").input_ids, skip_special_tokens=True) == "x"


def test_user_defined_tokens_are_not_split_and_are_decoded(network, tmp_path):
    vocabulary, merges = train_bpe()
    vocabulary |= {"<tool call>": len(vocabulary)}
    types = [3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL) - 1) + [4]
    write_gguf(tmp_path / "tiny.gguf", network, bpe=(vocabulary, merges), metadata={"tokenizer.ggml.token_type": types})
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    ids = tokenizer("a<tool call>b").input_ids
    assert vocabulary["<tool call>"] in ids and tokenizer.decode(ids, skip_special_tokens=True) == "a<tool call>b"


@pytest.mark.parametrize(
    ("pre", "said", "is_added"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_the_start_token_is_added_if_the_file_or_the_kind_specifies_it(pre, said, is_added, network, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", network, pre=pre, metadata={"tokenizer.ggml.add_bos_token": said})
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    plain = tokenizer("ab", add_special_tokens=False).input_ids
    assert tokenizer("ab").input_ids == [0] * is_added + plain
    assert tokenizer("ab", "ab").input_ids == ([0] * is_added + plain) * 2


def test_a_saved_and_reloaded_tokenizer_is_the_same(network, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", network, pre="qwen2")
    first = load_tokenizer(str(tmp_path / "tiny.gguf"))
    first.save_pretrained(tmp_path / "tokenizer")
    again = load_tokenizer(str(tmp_path / "tokenizer"))
    assert identity(again).sha256 == identity(first).sha256 and identity(first).name == "tiny.gguf"
    assert again.chat_template == first.chat_template


def test_bytes_are_counted_exactly(network, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", network, pre="llama-bpe")
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    for text, (ids, num_bytes) in zip(STRINGS, encode(tokenizer, STRINGS), strict=True):
        assert sum(num_bytes) == len(text.encode()) and len(ids) == len(num_bytes)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "kind 'llama' .* supported is gpt2"),
        (
            {"tokenizer.ggml.pre": "deepseek-coder"},
            r"tokenizer\.ggml\.pre=deepseek-coder.* supported are gpt-2, smollm",
        ),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre=missing"),
        ({"tokenizer.ggml.eos_token_id": None}, "has no end-of-text token"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused_by_name(metadata, message, network, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", network, metadata=metadata)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.merges": ["Q @@"]}, "merge 'Q @@' of tokens that its vocabulary lacks"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "300 tokens and 2 kinds"),
        ({"tokenizer.ggml.eos_token_id": 1000}, r"eos_token_id=1000 and has 300 tokens"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_damage(metadata, message, network, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", network, metadata=metadata)
    with pytest.raises(DamageError, match=message):
        load_tokenizer(str(tmp_path / "tiny.gguf"))
