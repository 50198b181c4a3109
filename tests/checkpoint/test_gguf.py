"""GGUF files in: the numbers of transformers' own reading and of the original, and clear refusals."""

import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from helpers.gguf_files import CONFIGS, ROPE, SHAPE, TEMPLATE, random_network, write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.gguf.dequant import dequantize as dequantize_of_transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import dlm_ray
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.models import families
from dlm_ray.models.gguf import is_gguf, open_gguf

IDS = torch.arange(40)[None] * 7 % SHAPE["vocab_size"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A network, and its file without quantisation."""
    network, path = random_network(CONFIGS["llama"]), tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, network)
    return network, path


@torch.no_grad()
def converted(path):
    """A network built from nothing but what the file says."""
    files = open_pretrained(str(path))
    network = AutoModelForCausalLM.from_config(families.read_config(files.config())).float().eval()
    for parameter in network.parameters():
        parameter.fill_(torch.nan)
    files.load(dict(network.named_parameters()))
    return network


@torch.no_grad()
def read_by_transformers(path, config):
    network = AutoModelForCausalLM.from_config(config).float().eval()
    parsed = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=network)
    network.load_state_dict(parsed["tensors"], strict=not config.tie_word_embeddings)
    return network


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_the_originals_and_those_of_transformers_own_reading(name, tmp_path):
    original = random_network(CONFIGS[name])
    write_gguf(tmp_path / "tiny.gguf", original)
    logits = converted(tmp_path / "tiny.gguf")(IDS).logits
    assert torch.equal(logits, original(IDS).logits)
    assert torch.equal(logits, read_by_transformers(tmp_path / "tiny.gguf", CONFIGS[name])(IDS).logits)


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_1], ids=lambda kind: kind.name)
@torch.no_grad()
def test_quantised_weights_are_the_librarys_and_within_the_quantisers_error(kind, tmp_path):
    original = random_network(CONFIGS["llama"])
    held = write_gguf(tmp_path / "tiny.gguf", original, quantisations={"": kind})
    ours = converted(tmp_path / "tiny.gguf")
    assert torch.equal(ours.model.layers[1].mlp.down_proj.weight, torch.from_numpy(held["blk.1.ffn_down.weight"]))
    assert torch.equal(ours(IDS).logits, read_by_transformers(tmp_path / "tiny.gguf", CONFIGS["llama"])(IDS).logits)
    steps = {Q.F16: 2**-11, Q.BF16: 2**-8, Q.Q8_0: 1 / 254, Q.Q4_0: 1 / 8, Q.Q4_1: 1 / 15, Q.Q5_1: 1 / 31}
    for name, weight in original.named_parameters():
        bound = (steps[kind] + 2**-10) * weight.abs().max()  # the scale of a block is itself rounded to half precision
        assert (dict(ours.named_parameters())[name] - weight).abs().max() <= bound, name


@pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q6_K, Q.Q2_K, Q.IQ4_XS], ids=lambda kind: kind.name)
def test_quantisations_that_only_llama_cpp_writes_are_read_as_transformers_reads_them(kind, tmp_path):
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 60 make finite halves.
    blocks = np.random.default_rng(0).integers(0, 60, (64, block_bytes), dtype=np.uint8)
    config = LlamaConfig(**{**SHAPE, "intermediate_size": 256})
    write_gguf(tmp_path / "tiny.gguf", random_network(config), raw={"blk.0.ffn_down.weight": (blocks, kind)})
    expected = dequantize_of_transformers(torch.from_numpy(blocks), int(kind)).reshape(64, 256)
    found = open_pretrained(str(tmp_path / "tiny.gguf")).read("model.layers.0.mlp.down_proj.weight")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_region_is_that_part_of_the_whole_in_every_kind_of_tensor(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_network(CONFIGS["qwen2"]), quantisations={"attn_k": Q.Q8_0})
    write_gguf(tmp_path / "llama.gguf", random_network(CONFIGS["llama"]), quantisations={"attn_k": Q.Q8_0})
    for file in ("tiny.gguf", "llama.gguf"):
        files = open_pretrained(str(tmp_path / file))
        for name in files.names():
            region = tuple(slice(length // 3, length // 3 + length // 2) for length in files.shape(name))
            assert torch.equal(files.read(name, region), files.read(name)[region]), name


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
@torch.no_grad()
def test_biases_of_a_llama_come_along_in_the_order_of_its_rows(bias, tmp_path):
    original = random_network(LlamaConfig(**SHAPE, **{bias: True}))
    write_gguf(tmp_path / "tiny.gguf", original)
    assert torch.equal(converted(tmp_path / "tiny.gguf")(IDS).logits, original(IDS).logits)


SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@torch.no_grad()
def test_rotary_scaling_that_the_metadata_say(name, tmp_path):
    scaling, metadata = SCALINGS[name]
    original = random_network(LlamaConfig(**SHAPE, rope_parameters={**ROPE, **scaling}))
    write_gguf(tmp_path / "tiny.gguf", original, metadata=metadata)
    assert torch.equal(converted(tmp_path / "tiny.gguf")(IDS).logits, original(IDS).logits)


@torch.no_grad()
def test_llama3s_rotary_scaling_is_found_again_from_the_factors_in_the_file(tmp_path):
    llama3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    original = random_network(LlamaConfig(**SHAPE, rope_parameters={**ROPE, "rope_type": "llama3", **llama3}))
    unscaled = 1 / (ROPE["rope_theta"] ** (torch.arange(0, 16, 2) / 16))
    factors = (unscaled / original.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert np.unique(factors.round(3)).size > 1 and factors.max() == pytest.approx(32)
    write_gguf(tmp_path / "tiny.gguf", original, raw={"rope_freqs.weight": (factors, Q.F32)})
    torch.testing.assert_close(converted(tmp_path / "tiny.gguf")(IDS).logits, original(IDS).logits)
    write_gguf(tmp_path / "other.gguf", original, raw={"rope_freqs.weight": (factors**2, Q.F32)})
    with pytest.raises(UserError, match="rope_freqs.weight, which differs from Llama 3.1's"):
        open_pretrained(str(tmp_path / "other.gguf")).config()


@torch.no_grad()
def test_the_mask_row_is_added_to_dequantised_rows(llama):
    network, path = llama
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "vocab_size": 301}))
    parameters = dict(wide.named_parameters())
    extra = {"model.embed_tokens.weight", "lm_head.weight"}
    norms = open_pretrained(str(path)).load(parameters, extra_rows=extra)
    assert norms.keys() == extra
    assert torch.equal(wide.lm_head.weight[:300], network.lm_head.weight)


@torch.no_grad()
def test_load_takes_a_gguf_file_and_scores_as_the_original(llama):
    network, path = llama
    model = dlm_ray.load(path)
    for name, parameter in model.denoiser.network.named_parameters():
        assert torch.equal(parameter, dict(network.named_parameters())[name]), name
    assert model.tokenizer.chat_template == TEMPLATE and model.sequence_length == SHAPE["max_position_embeddings"]
    with pytest.raises(UserError, match="weights=ema selects weights"):
        dlm_ray.load(path, "ema")


def test_a_file_is_gguf_by_its_ending_or_its_first_bytes(llama, tmp_path):
    (tmp_path / "model").write_bytes(llama[1].read_bytes())
    (tmp_path / "run.gguf").mkdir()
    assert is_gguf(str(tmp_path / "model")) and is_gguf("nowhere.gguf")
    assert not is_gguf(str(tmp_path / "run.gguf")) and not is_gguf(__file__) and not is_gguf("some/hub-name-GGUF")


REFUSED = {
    "architecture": (
        {"general.architecture": "gemma3"},
        "architecture 'gemma3', which is not supported; supported are llama",
    ),
    "experts": ({"expert_count": 8}, r"llama\.expert_count=8"),
    "unknown key": ({"logit_scale": 0.5}, r"llama\.logit_scale=0\.5"),
    "layers that differ": (
        {"attention.head_count_kv": [2, 1]},
        r"layers that differ \(llama\.attention\.head_count_kv",
    ),
    "adapter": ({"general.type": "adapter"}, "general.type='adapter'"),
    "parts": ({"split.count": 3}, "one of 3 parts"),
    "rotary scaling": (
        {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
        "supported are none, linear and yarn",
    ),
    "partial rotation": ({"rope.dimension_count": 8}, r"rope\.dimension_count=8 where heads have 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_configuration_cannot_say_is_refused_by_name(name, llama, tmp_path):
    metadata, message = REFUSED[name]
    write_gguf(tmp_path / "tiny.gguf", llama[0], metadata=metadata)
    with pytest.raises(UserError, match=message):
        open_pretrained(str(tmp_path / "tiny.gguf")).config()


def test_a_key_that_is_needed_and_missing_is_named(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama[0], metadata={"block_count": None})
    with pytest.raises(DamageError, match="no llama.block_count"):
        open_pretrained(str(tmp_path / "tiny.gguf")).config()


def test_a_tensor_of_another_network_is_named(llama, tmp_path):
    experts = {"blk.0.ffn_gate_inp.weight": (np.zeros((4, 64), np.float32), Q.F32)}
    write_gguf(tmp_path / "tiny.gguf", llama[0], raw=experts)
    with pytest.raises(UserError, match="blk.0.ffn_gate_inp.weight, which no network of llama"):
        open_pretrained(str(tmp_path / "tiny.gguf"))


def test_quantisations_that_cannot_be_read_are_refused_by_name_before_anything_is_loaded(llama, tmp_path):
    integers = {"blk.1.ffn_up.weight": (np.zeros((96, 64), np.int32), Q.I32)}
    write_gguf(tmp_path / "tiny.gguf", llama[0], raw=integers)
    with pytest.raises(UserError, match=r"quantisation I32 \(tensor blk\.1\.ffn_up\.weight\), which is not supported"):
        open_pretrained(str(tmp_path / "tiny.gguf"))


def test_a_quantisation_of_the_future_is_refused_by_its_number(llama, tmp_path):
    content = bytearray(llama[1].read_bytes())
    name = b"output_norm.weight"
    place = content.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the one dimension
    assert content[place : place + 4] == int(Q.F32).to_bytes(4, "little")
    content[place : place + 4] = (999).to_bytes(4, "little")
    (tmp_path / "new.gguf").write_bytes(content)
    with pytest.raises(UserError, match="quantisation that this version of the package gguf does not know .*999"):
        open_pretrained(str(tmp_path / "new.gguf"))


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5, 0.9999])
def test_a_file_that_is_cut_short_is_said_to_be_damaged(share, llama, tmp_path):
    content = llama[1].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DamageError, match=r"cut\.gguf is damaged, cut short"):
        open_pretrained(str(tmp_path / "cut.gguf"))


def test_what_is_no_gguf_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.gguf is no file here"):
        open_pretrained("nowhere.gguf")
    with pytest.raises(UserError, match="is no file here"):
        open_pretrained("s3://bucket/model.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(UserError, match="is no GGUF file"):
        open_pretrained(str(tmp_path / "text.gguf"))


def test_the_missing_package_is_named_with_its_extra(llama, monkeypatch, tmp_path):
    (tmp_path / "unread.gguf").write_bytes(llama[1].read_bytes())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        UserError, match=r"needs the package gguf, which is not installed; `pip install 'dlm-ray\[gguf\]'`"
    ):
        open_gguf(str(tmp_path / "unread.gguf"))


def test_a_file_that_was_replaced_is_read_again(llama, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama[0], metadata={"context_length": 64})
    assert open_pretrained(str(path)).config()["max_position_embeddings"] == 64
    path.unlink()
    write_gguf(path, llama[0], metadata={"context_length": 32})
    assert open_pretrained(str(path)).config()["max_position_embeddings"] == 32
