"""A build whose folder is in S3, by workers that run elsewhere than in the caller's folder."""

import json

import pytest
from helpers.data import make_documents

from dlm_ray.data import storage
from dlm_ray.data.index import load_index

pytestmark = pytest.mark.ray


def test_a_build_into_s3_from_relative_paths_is_the_build_on_the_disk(ray_session, s3, tmp_path, monkeypatch):
    from dlm_ray.runtime.build import build

    monkeypatch.setattr("dlm_ray.data.sources.CHUNK_BYTES", 4000)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(20)))
    monkeypatch.chdir(tmp_path)
    options = {"train_tokenizer_vocab": 300, "sequence_length": 32, "held_out": 0.2}
    here, there = (build(["in.jsonl"], out, **options) for out in ("out", f"{s3}/built"))
    assert here == there == load_index(f"{s3}/built")
    shards = [shard.file for split in there.splits.values() for shard in split.shards]
    assert len(shards) > 3
    assert all(storage.read(f"{s3}/built/{name}") == (tmp_path / "out" / name).read_bytes() for name in shards)
