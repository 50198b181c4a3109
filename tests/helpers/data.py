"""Small data folders, built by the functions that the Ray build calls."""

import json

import torch

SENTENCE = (
    "the model reads a row and writes what it has not seen because every token may be masked or kept as chance "
    "will have it"
)
WORDS = SENTENCE.split()


def make_documents(count=60, seed=0):
    """Return English-like documents with structure to learn: sentences that walk through WORDS."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for number in range(count):
        length = int(torch.randint(20, 160, (1,), generator=generator))
        start = int(torch.randint(0, len(WORDS), (1,), generator=generator))
        texts.append(f"Document {number}: " + " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length)) + ".\n")
    return texts


def make_data(
    folder,
    *,
    sequence_length=32,
    documents=None,
    held_out=0.2,
    sequences_per_shard=64,
    vocab=300,
    tokenizer=None,
    parts=2,
):
    """Build a data folder in this process and return its path."""
    from dlm_ray.data import build, sources
    from dlm_ray.data.tokenizer import identity, load_tokenizer, train_tokenizer

    documents = documents or make_documents()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or train_tokenizer(documents, vocab)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    tokenizer_identity = identity(load_tokenizer(str(folder / "tokenizer")))
    settings = build.Settings(tokenizer_identity.sha256, sequence_length, held_out, "text", sequences_per_shard)
    results = []
    for number in range(parts):
        source = folder.parent / f"{folder.name}-{number}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[number::parts]))
        piece = sources.Piece(str(source), "jsonl", 0, source.stat().st_size, source.stat().st_size)
        results.append(
            build.build_chunk(sources.SourceChunk(number, (piece,)), str(folder / "tokenizer"), settings, str(folder))
        )
    build.write_index(str(folder), results, sequence_length, tokenizer_identity, {"settings": {}, "inputs": []})
    return str(folder)
