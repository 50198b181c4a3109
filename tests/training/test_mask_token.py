"""Which token may be the mask.

None that rows hold, because it has probability 0 by definition. And a loss that is infinite ends the run.
"""

import json
import math
import re

import pytest
import torch
from helpers.data import make_data, make_documents
from helpers.recipes import tiny_recipe
from helpers.runs import losses

from dlm_ray.checkpoint.export import export
from dlm_ray.config.errors import UserError
from dlm_ray.data import shards
from dlm_ray.data.index import load_data_tokenizer, load_index
from dlm_ray.data.tokenizer import train_tokenizer
from dlm_ray.diffusion.denoiser import LossSum
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.generation.loading import load
from dlm_ray.training import loop, setup

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """With tokens for masks and padding that no text holds, as imported tokenizers have them."""
    tokenizer = train_tokenizer(make_documents(), 300)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "unk_token": "<|unk|>", "mask_token": "<|mask|>"})
    return make_data(tmp_path_factory.mktemp("masks") / "data", tokenizer=tokenizer)


def ids_of(data):
    tokenizer = load_data_tokenizer(data)
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk", "mask")}


@pytest.mark.parametrize(
    ("role", "named"), [("bos", "start and end"), ("eos", "start and end"), ("pad", "padding"), ("unk", "unknown")]
)
def test_tokens_that_rows_hold_are_refused_as_the_mask(data, tmp_path, role, named):
    recipe = tiny_recipe(data, model__mask_token=ids_of(data)[role])
    with pytest.raises(
        UserError,
        match=rf"model.mask_token={ids_of(data)[role]} is the tokenizer's {named} token '.*give the id of .*or `new`",
    ):
        loop.fit(recipe, tmp_path / "run")


def test_an_id_beyond_the_rows_of_the_network_is_refused_as_the_mask(data, tmp_path):
    vocabulary = load_index(data).tokenizer.vocab_size
    for asked in (vocabulary, vocabulary + 5):
        with pytest.raises(
            UserError, match=f"model.mask_token={asked} is not below the vocabulary's {vocabulary} rows"
        ):
            loop.fit(tiny_recipe(data, model__mask_token=asked), tmp_path / "run")


@pytest.mark.parametrize("which", ["first in the text", "last of the vocabulary"])
def test_rows_that_hold_the_mask_token_are_refused_with_the_place(which, tmp_path):
    documents = make_documents(30)
    data = make_data(tmp_path / "data", documents=documents, held_out=0.0, vocab=280)
    tokenizer = load_data_tokenizer(data)
    last = load_index(data).tokenizer.vocab_size - 1
    asked = last if which == "last of the vocabulary" else tokenizer.encode(documents[0])[0]
    assert any(asked in tokenizer.encode(text) for text in documents)
    message = (
        rf"position (\d+) of sequence (\d+) of {data}/(train-\d+-\d+.tar) holds id {asked}, which is the mask token"
    )
    with pytest.raises(UserError, match=message) as raised:
        loop.fit(tiny_recipe(data, model__mask_token=asked, validation__sequences=0), tmp_path / "run")
    position, row, shard = re.match(message, str(raised.value)).groups()
    with open(f"{data}/{shard}", "rb") as stream:
        assert shards.read_sequence(stream, int(row), 32)["input_ids"][int(position)] == asked


def test_a_token_that_no_text_holds_is_a_mask_in_training_scoring_and_export(data, tmp_path):
    mask_id = ids_of(data)["mask"]
    assert mask_id == load_index(data).tokenizer.vocab_size - 1
    metrics = loop.fit(tiny_recipe(data, model__mask_token=mask_id), tmp_path / "run")
    assert math.isfinite(metrics["loss"])
    for path in (tmp_path / "run", export(str(tmp_path / "run"), str(tmp_path / "exported"))):
        model = load(path)
        assert model.denoiser.mask_id == mask_id and math.isfinite(
            model.score(data, draws_per_sequence=2).bits_per_byte
        )
        assert "<|mask|>" not in model.sample("<|mask|>", length_tokens=4)[0]  # as a prompt it is text
        with pytest.raises(UserError, match=f"token 1 is the mask token \\(id {mask_id}\\)"):
            model.check_unmasked([5, mask_id])
    # An import brings its mask token with it.
    base = {"model__architecture": None, "model__base": str(tmp_path / "exported")}
    network = setup.resolve(tiny_recipe(data, **base), False, load_index(data).tokenizer)
    assert network.mask_id == mask_id and network.base_has_mask_row
    with pytest.raises(
        UserError, match=f"model.mask_token=3, but model.base=.* already has the mask token {mask_id}; remove"
    ):
        setup.resolve(tiny_recipe(data, **base, model__mask_token=3), False, load_index(data).tokenizer)


def test_an_imported_mask_token_that_text_holds_is_refused(data, tmp_path):
    loop.fit(tiny_recipe(data, training__steps=2, validation__sequences=0), tmp_path / "run")
    folder = export(str(tmp_path / "run"), str(tmp_path / "exported"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mask_token_id": ids_of(data)["eos"]}))
    recipe = tiny_recipe(data, model__architecture=None, model__base=str(folder))
    with pytest.raises(UserError, match="the mask token 0 of model.base=.* is the tokenizer's start and end token"):
        setup.resolve(recipe, False, load_index(data).tokenizer)


def test_a_network_with_more_rows_than_the_tokenizer_has_tokens_may_use_one_of_them_or_gets_another(data, tmp_path):
    """As Qwen's: its embedding is padded."""
    recipe = tiny_recipe(data, objective__name="autoregressive", training__steps=2, validation__sequences=0)
    loop.fit(recipe, tmp_path / "run")
    folder = export(str(tmp_path / "run"), str(tmp_path / "base"))
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 7}))
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(
        {**weights, name: torch.cat([weights[name], torch.zeros(7, weights[name].shape[1])])},
        folder / "model.safetensors",
    )
    for asked, mask_id in (("new", rows + 7), (rows + 2, rows + 2), (rows + 6, rows + 6)):
        own = {"model__architecture": None, "model__base": str(folder), "model__mask_token": asked}
        loop.fit(tiny_recipe(data, **own), tmp_path / f"padded-{asked}")
        model = load(tmp_path / f"padded-{asked}")
        assert model.denoiser.mask_id == mask_id and math.isfinite(
            model.score(data, draws_per_sequence=2).bits_per_byte
        )
        never = model.forbidden_token_ids(False, ())
        assert {*range(rows, model.denoiser.vocab_size)} <= {*never}
        model.sample(length_tokens=6, steps=2)


def test_data_whose_texts_begin_or_end_otherwise_than_the_bases_are_refused(data, tmp_path):
    """The same tokens in other roles, as a chat model's end token is another than its base's.

    The hash of the tokenizer is the same.
    """
    tokenizer = load_data_tokenizer(data)
    tokenizer.eos_token = "<|pad|>"
    other = make_data(tmp_path / "other", tokenizer=tokenizer)
    assert load_index(other).tokenizer.sha256 == load_index(data).tokenizer.sha256
    loop.fit(tiny_recipe(data, training__steps=2, validation__sequences=0), tmp_path / "run")
    with pytest.raises(
        UserError, match="was made with start token 0 and end token 0, and not 0 and 300 as data.sources"
    ):
        setup.resolve(
            tiny_recipe(other, model__architecture=None, model__base=str(tmp_path / "run")),
            False,
            load_index(other).tokenizer,
        )
    with pytest.raises(
        UserError, match="was made with start token 0 and end token 300, and not 0 and 0 as the checkpoint"
    ):
        load(tmp_path / "run").score(other)


class OverflowsAlone(Masked):
    """An objective whose loss is infinite at step 3 and whose gradient is not.

    That of -log p where p is 0 by definition.
    """

    def draw(self, key, x_0, maskable):
        self.is_bad = key.step == 2
        return super().draw(key, x_0, maskable)

    def forward(self, denoiser, batch):
        result = super().forward(denoiser, batch)
        return LossSum(result.weighted_sum + math.inf) if self.is_bad else result


def test_a_loss_that_is_infinite_where_its_gradient_is_not_ends_the_run_or_is_skipped(data_folder, tmp_path):
    recipe = tiny_recipe(data_folder, "bad", objective__name=f"{__name__}:OverflowsAlone")
    with pytest.raises(
        FloatingPointError, match=r"step 3 .* loss inf, gradient norm \d.*, not finite; the last checkpoint is valid"
    ):
        loop.fit(recipe, tmp_path / "run")
    metrics = loop.fit(
        tiny_recipe(data_folder, "bad", objective__name=recipe.objective.name, training__max_skipped_steps=1),
        tmp_path / "skips",
    )
    assert metrics["step"] == 8 and losses(tmp_path / "skips")[3] == math.inf
    assert math.isfinite(metrics["loss"])
