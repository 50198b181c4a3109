"""Shards: plain webdataset reads them, the same input gives the same bytes, and damage is never believed."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers.data import make_data, make_documents

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.recipe import Source
from dlm_ray.data.build import split_of
from dlm_ray.data.index import load_index
from dlm_ray.data.inspect import describe
from dlm_ray.data.order import Cursor, Order, SequenceReference
from dlm_ray.data.reading import ShardReader, iterate_sequences, open_sources, read_split
from dlm_ray.data.sources import documents, list_chunks
from dlm_ray.data.tokenizer import load_tokenizer


def tars(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).glob("*.tar"))}


def test_plain_webdataset_reads_what_we_read(data_folder):
    index = load_index(data_folder)
    rows = read_split(data_folder, "train")
    files = [f"{data_folder}/{shard.file}" for shard in index.splits["train"].shards]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    assert len(samples) == len(rows) == index.splits["train"].sequences > 100
    for sample, row in zip(samples, rows, strict=True):
        for field in ("input_ids", "document_ids", "num_bytes"):
            assert (sample[f"{field}.npy"] == getattr(row, field)).all()


def test_the_held_out_documents_are_there_byte_for_byte_and_in_no_other_split(data_folder):
    tokenizer = load_tokenizer(f"{data_folder}/tokenizer")
    texts = {
        split: [text for text in make_documents() if split_of(text, 0.2) == split] for split in ("train", "held_out")
    }
    assert texts["held_out"] and texts["train"]
    for split, expected in texts.items():
        pieces = {}
        for row in read_split(data_folder, split):
            for document in np.unique(row.document_ids[row.document_ids >= 0]):
                ids = row.input_ids[row.document_ids == document][1:]
                pieces.setdefault((row.chunk, int(document)), []).extend(ids.tolist())
        assert sorted(tokenizer.decode(ids, skip_special_tokens=True) for ids in pieces.values()) == sorted(expected)
        index = load_index(data_folder).splits[split]
        assert index.bytes == sum(len(text.encode()) for text in expected)
        assert index.documents == len(expected)


def test_the_same_input_gives_the_same_bytes(data_folder, tmp_path):
    assert tars(make_data(tmp_path / "again")) == tars(data_folder)


def test_a_flipped_byte_names_the_shard_and_both_hashes(data_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(data_folder, folder)
    victim = sorted(folder.glob("train-*.tar"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(
        DamageError,
        match=rf"{victim.name} is damaged: expected sha256 \w+, found {hashlib.sha256(content).hexdigest()}",
    ):
        read_split(str(folder), "train")
    victim.unlink()
    with pytest.raises(DamageError, match=f"{victim.name} is missing"):
        read_split(str(folder), "train")


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_shard_that_is_lost_after_it_was_checked_is_damage_or_skipped(data_folder, tmp_path, harm):
    folder = tmp_path / "data"
    shutil.copytree(data_folder, folder)
    index = load_index(str(folder))
    readers = {mode: ShardReader([str(folder)], [index], on_bad_sample=mode) for mode in ("fail", "skip")}
    wanted = [SequenceReference(0, 0, 0), SequenceReference(0, 0, 5), SequenceReference(0, 1, 3)]
    whole = [row.input_ids.tolist() for row in readers["fail"].read(wanted)]
    assert [row.input_ids.tolist() for row in readers["skip"].read(wanted)] == whole
    victim = folder / index.splits["train"].shards[0].file
    if harm == "truncate":
        victim.write_bytes(
            victim.read_bytes()[: victim.stat().st_size // index.splits["train"].shards[0].sequences * 3]
        )
    else:
        victim.unlink()
    with pytest.raises(DamageError, match=f"shard {victim} was complete when it was checked, and no longer is"):
        readers["fail"].read(wanted)
    *lost, kept = readers["skip"].read(wanted)
    assert kept.input_ids.tolist() == whole[2] and not kept.finding
    assert all((row.document_ids == -1).all() and "no longer is" in row.finding for row in lost)


def test_two_sources_must_agree_in_tokenizer_and_sequence_length(data_folder, tmp_path):
    other_tokenizer = make_data(tmp_path / "tokenizer", vocab=320)
    with pytest.raises(UserError, match="was built with tokenizer"):
        open_sources([Source(path=data_folder), Source(path=other_tokenizer)])
    other_rows = make_data(tmp_path / "rows", sequence_length=16, tokenizer=load_tokenizer(f"{data_folder}/tokenizer"))
    with pytest.raises(UserError, match="sequences of 16 tokens"):
        open_sources([Source(path=data_folder), Source(path=other_rows)])


def test_a_folder_without_an_index_and_a_newer_format_are_refused(data_folder, tmp_path):
    with pytest.raises(UserError, match="dlm-ray data build"):
        load_index(str(tmp_path))
    fields = json.loads(Path(data_folder, "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**fields, "format": 9}))
    with pytest.raises(UserError, match="format 9"):
        load_index(str(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps({**fields, "splits": 3}))
    with pytest.raises(DamageError, match="cannot be read"):
        load_index(str(tmp_path))


def test_the_stream_gives_the_ordered_sequences_and_resumes(data_folder):
    index = load_index(data_folder)
    share = {"global_batch_size": 10, "rank": 0, "world_size": 1}

    def stream(cursor, num_steps):
        order = Order([index], [1.0], 0, 2)
        return list(iterate_sequences(ShardReader([data_folder], [index]), order, cursor, num_steps=num_steps, **share))

    whole = stream(Cursor.start(1), 40)
    after = stream(whole[24][1], 15)
    for (rows, cursor), (again, cursor_again) in zip(whole[25:], after, strict=True):
        assert cursor == cursor_again
        assert all((one.input_ids == two.input_ids).all() for one, two in zip(rows, again, strict=True))


def test_inspect_shows_what_is_there(data_folder):
    described = describe(data_folder)
    assert described["splits"]["train"]["documents"] > described["splits"]["held_out"]["documents"] > 0
    assert any("Document" in segment["text"] for segment in described["first_sequences"][0])


def test_jsonl_lines_are_read_once_wherever_the_file_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("dlm_ray.data.sources.CHUNK_BYTES", 50)
    texts = [f"text number {i} " + "x" * (i % 37) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chunks = list_chunks([str(tmp_path / "a.jsonl")])
    assert len(chunks) > 5
    assert [text for chunk in chunks for text in documents(chunk, "text")] == texts


def test_an_edit_of_any_byte_of_a_document_rebuilds_its_chunk(data_folder, tmp_path, monkeypatch):
    """Also of the line that begins in a chunk and ends behind it."""
    from dlm_ray.data import build

    monkeypatch.setattr("dlm_ray.data.sources.CHUNK_BYTES", 200)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} " + "ABCDEFGH" * 8}) + "\n" for i in range(12)))
    chunks = list_chunks([str(file)])
    settings = build.Settings(load_index(data_folder).tokenizer.sha256, 32, 0.2, "text", 64)
    out, tokenizer, content = str(tmp_path / "out"), f"{data_folder}/tokenizer", file.read_bytes()
    for chunk in chunks:
        build.build_chunk(chunk, tokenizer, settings, out)
    texts = [list(documents(chunk, "text")) for chunk in chunks]
    changes = 0
    for at in range(190, 420):
        if content[at : at + 1] in b"ABCDEFGH":
            file.write_bytes(content[:at] + b"Z" + content[at + 1 :])
            for chunk, before in zip(chunks, texts, strict=True):
                if list(documents(chunk, "text")) != before:
                    changes += 1
                    assert build.finished_chunk(chunk, settings, out) is None
    assert changes > 100
    file.write_bytes(content)
    assert all(build.finished_chunk(chunk, settings, out) for chunk in chunks)


def test_chunks_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("zero")
    monkeypatch.chdir(tmp_path)
    for given in ("in", "in/a.txt", "in/*.txt"):
        [chunk] = list_chunks([given])
        assert [piece.path for piece in chunk.pieces] == [str(tmp_path / "in/a.txt")]


def test_text_without_a_utf8_form_is_refused_by_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d pair"}\n')
    [chunk] = list_chunks([str(tmp_path / "a.jsonl")])
    with pytest.raises(UserError, match="a.jsonl, byte 17: an unpaired surrogate at character 5"):
        list(documents(chunk, "text"))


def test_parquet_folders_and_patterns_are_sources(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"body": ["one", "two"]}), tmp_path / "in" / "b.parquet")
    (tmp_path / "in" / "a.txt").write_text("zero")
    (tmp_path / "in" / ".hidden").write_text("never")
    [chunk] = list_chunks([str(tmp_path / "in")])
    assert list(documents(chunk, "body")) == ["zero", "one", "two"]
    with pytest.raises(UserError, match="no column 'text'"):
        list(documents(chunk, "text"))
    with pytest.raises(UserError, match="not a file, a folder"):
        list_chunks([str(tmp_path / "nothing*.txt")])


def test_shards_on_s3_are_the_same_shards(s3, data_folder, tmp_path):
    from dlm_ray.data import storage

    for path in sorted(Path(data_folder).rglob("*")):
        if path.is_file():
            storage.write(f"{s3}/copy/{path.relative_to(data_folder)}", path.read_bytes())
    assert load_index(f"{s3}/copy") == load_index(data_folder)
    ours, theirs = read_split(f"{s3}/copy", "train", 40), read_split(data_folder, "train", 40)
    assert all((one.input_ids == two.input_ids).all() for one, two in zip(ours, theirs, strict=True))
    with pytest.raises(UserError, match="not a data folder"):
        load_index(f"{s3}/nothing")


def test_a_shard_on_s3_is_fetched_once_and_checked_on_the_way(s3, data_folder, monkeypatch):
    from dlm_ray.data import storage

    index = load_index(data_folder)
    files = [shard.file for shard in index.splits["train"].shards]
    for name in files:
        storage.write(f"{s3}/once/{name}", Path(data_folder, name).read_bytes())
    opened = []
    open_input = storage.open_input
    monkeypatch.setattr(storage, "open_input", lambda path: opened.append(path) or open_input(path))
    order, share = Order([index], [1.0], 0, 2), {"global_batch_size": 10, "rank": 0, "world_size": 1, "num_steps": 20}
    remote = list(iterate_sequences(reader := ShardReader([f"{s3}/once"], [index]), order, Cursor.start(1), **share))
    everything = [SequenceReference(0, number, 0) for number in range(len(files))]
    reader.read(everything)
    reader.read(everything)
    assert sorted(opened) == sorted(f"{s3}/once/{name}" for name in files)
    local = list(iterate_sequences(ShardReader([data_folder], [index]), order, Cursor.start(1), **share))
    for (rows, _), (expected, _) in zip(remote, local, strict=True):
        assert all((one.input_ids == two.input_ids).all() for one, two in zip(rows, expected, strict=True))
    monkeypatch.setattr("dlm_ray.data.reading._COPIES_BYTES", 1)  # no more than one copy is kept: each is fetched again
    reader.read(everything)
    assert len(opened) > len(files)
    storage.write(f"{s3}/once/{files[0]}", b"not a shard")
    with pytest.raises(DamageError, match=f"{files[0]} is damaged"):
        ShardReader([f"{s3}/once"], [index]).read(everything)


def test_a_chunk_is_written_to_s3_as_to_the_disk_and_recognised_when_it_is_finished(s3, data_folder, tmp_path):
    from dlm_ray.data import build, storage
    from dlm_ray.data.sources import Piece, SourceChunk
    from dlm_ray.data.tokenizer import identity

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(20)))
    chunk = SourceChunk(0, (Piece(str(source), "jsonl", 0, source.stat().st_size, source.stat().st_size),))
    settings = build.Settings(identity(load_tokenizer(f"{data_folder}/tokenizer")).sha256, 32, 0.2, "text", 64)
    results = [
        build.build_chunk(chunk, f"{data_folder}/tokenizer", settings, out)
        for out in (str(tmp_path / "out"), f"{s3}/out")
    ]
    assert results[0] == results[1]
    name = results[0]["train"]["shards"][0]["file"]
    assert storage.read(f"{s3}/out/{name}") == (tmp_path / "out" / name).read_bytes()
    assert build.finished_chunk(chunk, settings, f"{s3}/out") == results[1]
    source.write_text(source.read_text().replace("token", "TOKEN"))
    assert build.finished_chunk(chunk, settings, f"{s3}/out") is None  # the input has changed


def test_a_process_that_reads_shards_imports_neither_torch_nor_transformers(data_folder):
    program = (
        "import sys; from dlm_ray.data.reading import read_split; "
        f"assert len(read_split({data_folder!r}, 'train', 2)) == 2; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
