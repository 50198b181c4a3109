"""Tiny tokenizers of the kinds that there are, trained on the spot.

Each has a start, an end and a padding token of its own but the first.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dlm_ray.data.tokenizer import train_tokenizer
from helpers.data import make_documents

DOCUMENTS = [
    *make_documents(40),
    "punctuation and digits: <|/[]> 0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz\n",
]


def byte_level():
    """Byte-level BPE; its end token starts texts, too, as GPT-2's."""
    return train_tokenizer(DOCUMENTS, 400)


def unigram():
    """SentencePiece-like Unigram, as T5's; its special tokens are pieces of the vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    names = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        DOCUMENTS, trainers.UnigramTrainer(vocab_size=150, special_tokens=names, unk_token="<unk>")
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def word_piece():
    """WordPiece, as BERT's, on words between spaces: a special token that stands alone is a word of the vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(DOCUMENTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=names))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


def whole_words():
    """BPE that takes whole words of its vocabulary before it merges, as Llama 3's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(DOCUMENTS, trainers.BpeTrainer(vocab_size=300, special_tokens=names))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {"byte-level": byte_level, "unigram": unigram, "word-piece": word_piece, "whole-words": whole_words}
