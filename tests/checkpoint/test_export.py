"""A checkpoint out as a Hugging Face folder: stock transformers opens it and has the same numbers."""

import json
from pathlib import Path

import pytest
import tensorstore as ts
import torch
from helpers.steps import commit_step, weights_of
from transformers import GPT2Config, LlamaConfig

from dlm_ray.checkpoint import export as export_module
from dlm_ray.checkpoint.arrays import below, key_value_store
from dlm_ray.checkpoint.export import export
from dlm_ray.config.errors import DamageError, UserError

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ),
    "gpt2-tied": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stock_transformers_has_the_same_numbers_averaged_or_raw(config, tmp_path):
    raw, averaged = commit_step(str(tmp_path / "run"), config)
    for weights, expected in [(None, averaged), ("ema", averaged), ("raw", raw)]:
        found = weights_of(export(str(tmp_path / "run"), str(tmp_path / f"out-{weights}"), weights=weights))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_large_model_is_cut_into_files_with_an_index(tmp_path, monkeypatch):
    _, averaged = commit_step(str(tmp_path / "run"), CONFIGS["llama"])
    monkeypatch.setattr(export_module, "FILE_BYTES", 8000)
    out = export(str(tmp_path / "run"), str(tmp_path / "out"))
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2 and (out / "model.safetensors.index.json").is_file()
    assert all(file.stat().st_size < 8000 + 2000 for file in files)  # the weights and a header
    found = weights_of(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in averaged.items())


def test_the_card_says_what_the_model_is(tmp_path):
    commit_step(str(tmp_path / "run"), CONFIGS["llama"])
    card = " ".join((export(str(tmp_path / "run"), str(tmp_path / "out")) / "README.md").read_text().split())
    assert (
        "dlm_ray" in card
        and "mask token has id 49" in card
        and "transformers >= 5.17" in card
        and "position i-1" in card
    )
    commit_step(
        str(tmp_path / "ar"), CONFIGS["llama"], is_causal=True, shift=False, mask_id=None, objective="autoregressive"
    )
    card = (export(str(tmp_path / "ar"), str(tmp_path / "out-ar")) / "README.md").read_text()
    assert "autoregressive" in card and "mask token" not in card


@pytest.mark.parametrize("remote", [False, True], ids=["local", "s3"])
def test_the_tokenizer_beside_the_step_comes_along_wherever_the_run_lies(tmp_path, s3, remote):
    run = f"{s3}/export-run" if remote else str(tmp_path / "run")
    commit_step(run, CONFIGS["llama"])
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"a": 1}'}
    for name, content in files.items():
        ts.KvStore.open(below(key_value_store(run), "tokenizer")).result().write(name, content).result()
    out = export(run, str(tmp_path / "out"))
    assert {name: (out / name).read_bytes() for name in files} == files


def test_a_custom_objective_is_exported_with_its_class_path_without_importing_it(tmp_path):
    commit_step(str(tmp_path / "run"), CONFIGS["llama"], objective="package.module:Own")
    out = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert json.loads((out / "config.json").read_text())["dlm_ray"]["objective"] == "package.module:Own"


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path):
    run = str(tmp_path / "run")
    with pytest.raises(UserError, match="is not a checkpoint"):
        export(run, str(tmp_path / "out"))
    commit_step(run, CONFIGS["llama"], with_ema=False)
    with pytest.raises(UserError, match="no averaged weights"):
        export(run, str(tmp_path / "out"), weights="ema")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(run, str(tmp_path / "full"))
    data = max(Path(run).rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(DamageError, match="model."):
        export(run, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]


def test_the_type_of_the_weights_is_that_of_the_checkpoint(tmp_path):
    commit_step(str(tmp_path / "run"), CONFIGS["llama"])
    out = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
