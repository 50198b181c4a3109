"""`dlm-ray convert A B`: a Hugging Face folder that stock transformers opens, out of everything that is read."""

import json

import pytest
import torch
from gguf import GGMLQuantizationType as Q
from helpers.gguf_files import CONFIGS, TEMPLATE, random_network, write_gguf
from helpers.steps import commit_step, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlm_ray.checkpoint import export as export_module
from dlm_ray.checkpoint.convert import convert
from dlm_ray.checkpoint.export import export
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.data.tokenizer import load_tokenizer


@pytest.fixture
def gguf_file(tmp_path):
    write_gguf(
        tmp_path / "tiny.gguf",
        random_network(CONFIGS["llama-tied"]),
        quantisations={"": Q.Q8_0},
        metadata={"general.license": "mit"},
    )
    return tmp_path / "tiny.gguf"


def test_gguf_becomes_a_folder_that_stock_transformers_opens(gguf_file, tmp_path):
    out = convert(str(gguf_file), str(tmp_path / "out"))
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    files = open_pretrained(str(gguf_file))
    assert stock.dtype == torch.float32 and type(stock).__name__ == "LlamaForCausalLM"
    parameters = dict(stock.named_parameters())
    assert parameters.keys() == set(files.names())
    assert all(torch.equal(parameter, files.read(name)) for name, parameter in parameters.items())
    text = "The year 1984 <|im_start|>user"
    assert (
        tokenizer(text).input_ids == load_tokenizer(str(gguf_file))(text).input_ids
        and tokenizer.chat_template == TEMPLATE
    )
    card = " ".join((out / "README.md").read_text().split())
    assert "license: mit" in card and "tiny.gguf" in card and "Q8_0" in card and "float32" in card


def test_the_type_can_be_chosen_and_a_large_model_is_cut_into_files(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "FILE_BYTES", 40_000)
    out = convert(str(gguf_file), str(tmp_path / "out"), dtype="bfloat16")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    stock, files = AutoModelForCausalLM.from_pretrained(out), open_pretrained(str(gguf_file))
    assert stock.dtype == torch.bfloat16
    assert all(torch.equal(parameter, files.read(name).bfloat16()) for name, parameter in stock.named_parameters())


def test_a_checkpoint_of_ours_is_converted_as_export_does_it(tmp_path):
    run = str(tmp_path / "run")
    commit_step(run, CONFIGS["llama"])
    exported, out = (
        export(run, str(tmp_path / "exported"), weights="raw"),
        convert(run, str(tmp_path / "out"), weights="raw"),
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in exported.iterdir()
    }
    half = convert(run, str(tmp_path / "half"), dtype="float16")
    _, averaged = commit_step(str(tmp_path / "same"), CONFIGS["llama"])
    assert all(torch.equal(tensor, averaged[name].half()) for name, tensor in weights_of(half).items())
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"


def test_a_folder_is_copied_with_its_tokenizer_in_another_type(gguf_file, tmp_path):
    folder = convert(str(gguf_file), str(tmp_path / "folder"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    same, half = (
        convert(str(folder), str(tmp_path / "same")),
        convert(str(folder), str(tmp_path / "half"), dtype="bfloat16"),
    )
    before, after, halves = weights_of(folder), weights_of(same), weights_of(half)
    assert all(
        torch.equal(after[name], tensor) and torch.equal(halves[name], tensor.bfloat16())
        for name, tensor in before.items()
    )
    copied = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {path.name for path in half.iterdir()} == copied


def test_directions_that_do_not_exist_are_refused_and_leave_nothing(gguf_file, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="would be a GGUF file, which dlm_ray only reads"):
        convert(str(gguf_file), str(tmp_path / "other.gguf"))
    with pytest.raises(UserError, match="on a local disk only"):
        convert(str(gguf_file), "s3://bucket/folder")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(str(gguf_file), str(tmp_path))
    with pytest.raises(UserError, match="dtype=int8: must be one of float32, bfloat16, float16"):
        convert(str(gguf_file), out, dtype="int8")
    with pytest.raises(UserError, match="weights=raw selects weights of a dlm_ray checkpoint"):
        convert(str(gguf_file), out, weights="raw")
    (tmp_path / "neither").mkdir()
    with pytest.raises(UserError, match="neither a dlm_ray checkpoint .* nor a GGUF file"):
        convert(str(tmp_path / "neither"), out)
    (tmp_path / "neither").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_unreadable_tokenizer_leaves_no_half_folder(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_network(CONFIGS["qwen2"]), metadata={"tokenizer.ggml.merges": ["Q @@"]})
    with pytest.raises(DamageError, match="merge"):
        convert(str(tmp_path / "tiny.gguf"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
