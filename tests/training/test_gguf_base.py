"""A run that starts from a GGUF file: its tokenizer builds the data, its dequantised weights are the starting point."""

import pytest
import torch
from gguf import GGMLQuantizationType as Q
from helpers.data import make_data, make_documents
from helpers.gguf_files import CONFIGS, SHAPE, random_network, write_gguf
from helpers.recipes import tiny_recipe

from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.pretrained import open_pretrained
from dlm_ray.config.errors import UserError
from dlm_ray.data.tokenizer import load_tokenizer
from dlm_ray.training import loop

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny.gguf"
    write_gguf(path, random_network(CONFIGS["llama-tied"]), quantisations={"": Q.Q8_0})
    return str(path)


def adaptation(data, base, **changes):
    return tiny_recipe(data, model__architecture=None, model__base=base, training__steps=2, ema=None, **changes)


def test_a_run_starts_from_the_dequantised_weights_and_aligns_with_them(base, tmp_path):
    data = make_data(tmp_path / "data", documents=make_documents(12), tokenizer=load_tokenizer(base))
    loop.fit(adaptation(data, base, optimizer__learning_rate=1e-12, objective__alignment_weight=1.0), tmp_path / "run")
    step = listing.latest(str(tmp_path / "run"))
    assert commit.read_manifest(step).model["config"]["vocab_size"] == SHAPE["vocab_size"] + 1
    files = open_pretrained(base)
    for name in files.names():
        found = commit.read_tensor(step, f"model.{name}")[: files.shape(name)[0]]
        torch.testing.assert_close(found, files.read(name), rtol=0, atol=1e-6)


def test_data_of_another_tokenizer_is_refused_with_the_command_that_builds_it(base, data_folder, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer=.*tiny\.gguf"):
        loop.fit(adaptation(data_folder, base), tmp_path / "run")
