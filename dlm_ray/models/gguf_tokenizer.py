"""Rebuilds the tokenizer of a GGUF file as a fast Hugging Face tokenizer with the same ids as the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.models.gguf import open_gguf
from dlm_ray.models.gguf_file import GGUFFile

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class _Kind:
    """The settings that `tokenizer.ggml.pre` stands for: how text is split before the merges, and further options."""

    split: str | None = None
    """The pattern whose matches are the pieces of a text; None: GPT-2's pattern."""
    single_digits: bool = False
    """Whether every digit is a piece."""
    normalize: bool = False
    """Whether to normalise to Unicode's NFC, as the original tokenizer does and llama.cpp does not."""
    ignore_merges: bool = False
    """Whether a piece that is a token skips the merges."""
    add_bos: bool = False
    """Whether to add the start token, if the file does not specify it."""


_LLAMA3 = _Kind(
    split=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    ignore_merges=True,
    add_bos=True,
)
_KINDS = {
    "gpt-2": _Kind(),
    "smollm": _Kind(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Kind(
        split=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        normalize=True,
    ),
    "tekken": _Kind(
        split=(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        ignore_merges=True,
        add_bos=True,
    ),
}


def gguf_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the GGUF file at `path`, with its special and added tokens and its chat template.

    Raises:
        UserError: if it is not one of the supported byte-level BPE tokenizers.
        DamageError: if its vocabulary and its merges do not match.
    """
    file = open_gguf(path)
    kind = _kind(file)
    tokens = file.strings("tokenizer.ggml.tokens")
    types = file.integers("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise DamageError(
            f"{path} has {len(tokens)} tokens and {len(types)} kinds of tokens; fetch or convert the file again"
        )
    # Converters give embedding rows without a token such names; the original tokenizer has no token there.
    vocabulary = {
        token: number
        for number, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if (type_, token) != (_UNUSED, f"[PAD{number}]")
    }
    merges = [cast("tuple[str, str]", tuple(merge.split(" ", 1))) for merge in file.strings("tokenizer.ggml.merges")]
    broken = next((merge for merge in merges if not {*merge, "".join(merge)} <= vocabulary.keys()), None)
    if broken is not None:
        raise DamageError(
            f"{path} has the merge {' '.join(broken)!r} of tokens that its vocabulary lacks; fetch or convert it again"
        )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind.ignore_merges))
    if kind.normalize:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    for type_, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        # This includes tokens that the merges can produce: added tokens are split off the text first.
        added = [
            AddedToken(token, special=is_special, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == type_
        ]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    _add_template(tokenizer, file, kind)
    return _as_fast(tokenizer, file)


def _kind(file: GGUFFile) -> _Kind:
    model = file.metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UserError(
            f"{file.path} has a tokenizer of kind {model!r} (tokenizer.ggml.model), which is not supported; supported "
            "is gpt2, which is byte-level BPE: choose another file, or the model's Hugging Face folder"
        )
    name = str(file.metadata.get("tokenizer.ggml.pre", "missing"))
    if name not in _KINDS:
        raise UserError(
            f"{file.path} cuts text in a way that is not supported (tokenizer.ggml.pre={name}); supported are "
            f"{', '.join(_KINDS)}: choose another file, or the model's Hugging Face folder"
        )
    return _KINDS[name]


def _pre_tokenizer(kind: _Kind) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if kind.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if kind.split is not None:
        steps.append(pre_tokenizers.Split(Regex(kind.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.split is None))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _add_template(tokenizer: Tokenizer, file: GGUFFile, kind: _Kind) -> None:
    """Make the tokenizer add the start and end tokens that the file specifies."""
    around = {}
    for name, default in (("bos", kind.add_bos), ("eos", False)):
        if file.metadata.get(f"tokenizer.ggml.add_{name}_token", default) and _special(file, name) is not None:
            around[name] = _special(file, name)
    if around:
        parts = [around.get("bos"), "$A", around.get("eos")]
        second = [part and f"{part}:1" for part in (around.get("bos"), "$B", around.get("eos"))]
        ids = {token: file.metadata[f"tokenizer.ggml.{name}_token_id"] for name, token in around.items()}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in parts if part],
            pair=[part for part in [*parts, *second] if part],
            special_tokens=list(ids.items()),
        )


def _as_fast(tokenizer: Tokenizer, file: GGUFFile) -> PreTrainedTokenizerFast:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {role: _special(file, name) for role, name in names.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        name_or_path=file.path,
        clean_up_tokenization_spaces=False,
        model_max_length=file.config()["max_position_embeddings"],
        **{role: token for role, token in special.items() if token is not None},
    )
    fast.chat_template = file.metadata.get("tokenizer.chat_template")
    return fast


def _special(file: GGUFFile, name: str) -> str | None:
    """Return the token of a role, such as `bos`, or None."""
    number, tokens = file.integer(f"tokenizer.ggml.{name}_token_id"), file.strings("tokenizer.ggml.tokens")
    if number is not None and number >= len(tokens):
        raise DamageError(
            f"{file.path} has tokenizer.ggml.{name}_token_id={number} and has {len(tokens)} tokens; "
            "fetch or convert it again"
        )
    return None if number is None else tokens[number]
