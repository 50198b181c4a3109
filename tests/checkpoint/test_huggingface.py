"""Hugging Face folders in: the numbers of from_pretrained, a new row for the mask token, and clear refusals."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dlm_ray.checkpoint.huggingface import resolve_folder
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import DamageError, UserError

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ),
    "llama-tied": LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path, max_shard_size="8KB")
    return tmp_path


def parameters(config):
    """Of a network built without memory, as large ones are: whatever is not loaded is garbage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    model.tie_weights()  # emptied one by one, tied tensors come apart
    return dict(model.named_parameters())


def test_the_numbers_are_those_of_from_pretrained(folder):
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ours = parameters(stock.config)
    open_pretrained(str(folder)).load(ours)
    for name, parameter in stock.named_parameters():
        assert torch.equal(ours[name], parameter), name


def test_gpt2_files_without_the_models_prefix_and_with_old_buffers(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"])
    old = {name.removeprefix("transformer."): p.detach().clone() for name, p in model.named_parameters()}
    save_file({**old, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "model.safetensors")
    ours = parameters(CONFIGS["gpt2"])
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt2"].to_dict()))
    open_pretrained(str(tmp_path)).load(ours)
    assert all(torch.equal(ours[name], parameter) for name, parameter in model.named_parameters())


def test_the_mask_row_is_the_mean_with_noise_and_the_rest_is_untouched(folder):
    stock = AutoModelForCausalLM.from_pretrained(folder)
    config = stock.config.__class__(**{**stock.config.to_dict(), "vocab_size": 51})
    ours = parameters(config)
    embedding = next(name for name, parameter in ours.items() if parameter.shape[0] == 51)
    extra = {name for name, parameter in ours.items() if parameter.shape[0] == 51}
    norms = open_pretrained(str(folder)).load(ours, extra_rows=extra, seed=3)
    old = dict(stock.named_parameters())[embedding]
    assert torch.equal(ours[embedding][:50], old)
    noise = ours[embedding][50] - old.mean(0)
    assert 0.3 < noise.norm() < 2.0  # N(0, 1/D) over D numbers
    assert norms[embedding] == pytest.approx(ours[embedding][50].norm().item(), rel=1e-5)


def test_what_does_not_fit_is_listed(folder):
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ours = {name: parameter.data for name, parameter in parameters(stock.config).items()}
    with pytest.raises(UserError, match=r"missing \['no.such.weight'\]"):
        open_pretrained(str(folder)).load({**ours, "no.such.weight": torch.zeros(1)})
    name, tensor = next(iter(ours.items()))
    with pytest.raises(UserError, match="unexpected"):
        open_pretrained(str(folder)).load({other: t for other, t in ours.items() if other != name})
    with pytest.raises(UserError, match="has shape"):
        open_pretrained(str(folder)).load({**ours, name: torch.zeros(tensor.shape[0] + 3, *tensor.shape[1:])})


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_missing_or_cut_file_is_named(folder, damage):
    ours = {
        name: parameter.data
        for name, parameter in parameters(AutoModelForCausalLM.from_pretrained(folder).config).items()
    }
    victim = sorted(folder.glob("model-*.safetensors"))[-1]
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(DamageError, match=victim.name):
        open_pretrained(str(folder)).load(ours)


def test_pickles_are_never_opened_and_nowhere_is_said_to_be_nowhere(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="convert it to safetensors"):
        open_pretrained(str(tmp_path)).load({"a": torch.zeros(1)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a dlm_ray checkpoint"):
        resolve_folder(str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub has nothing"):
        resolve_folder("nobody/nothing-of-that-name")


def test_a_hub_name_brings_the_chat_template_and_gguf_only_repositories_say_what_to_do(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match="no config.json on the hub; if it has GGUF files, download one"):
        resolve_folder("somebody/model-GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_folder("somebody/model") == tmp_path
    assert "*.jinja" in asked  # where transformers keeps chat templates today
