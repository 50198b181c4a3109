"""A run in one process: it learns, resumes bit for bit, and does not depend on how its batch is cut."""

import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import WORDS, make_data
from helpers.recipes import tiny_recipe
from helpers.runs import assert_same_run, losses, metrics, tensors

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.recipe import Source
from dlm_ray.data import storage
from dlm_ray.data.index import load_data_tokenizer
from dlm_ray.data.reading import held_out_sequences, open_sources, read_split
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.training import loop
from dlm_ray.training.curriculum import annealing_ratio
from dlm_ray.training.setup import with_precision
from dlm_ray.training.step import micro_batches, num_micro_steps

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base(data_folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "base"
    return run_dir, loop.fit(
        tiny_recipe(data_folder, "base", objective__name="autoregressive", training__steps=60), run_dir
    )


def test_an_autoregressive_run_learns(base):
    run_dir, result = base
    curve = losses(run_dir)
    assert curve[60] < curve[1] - 1.0
    assert result["validation"]["nats_per_token"] < curve[1] - 0.5 and result["validated_step"] == 60
    assert [event["step"] for event in metrics(run_dir) if "validation" in event] == list(
        range(4, 61, 4)
    )  # each said once, of its own step
    assert result["checkpoint"] == listing.latest(str(run_dir))


def test_adaptation_starts_from_the_base_and_anneals(base, data_folder, tmp_path):
    recipe = tiny_recipe(
        data_folder,
        "adapted",
        model__architecture=None,
        model__base=str(base[0]),
        curriculum__annealing={"pattern": "bernoulli", "steps": 4},
    )
    result = loop.fit(recipe, tmp_path / "run")
    visible = [event["annealing_ratio"] for event in metrics(tmp_path / "run") if "loss" in event]
    assert visible == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert len(result["validation"]["nll_by_t"]) == 5
    manifest = commit.read_manifest(result["checkpoint"])
    assert manifest.model["mask_id"] == manifest.model["config"]["vocab_size"] - 1
    assert manifest.capabilities["infill"] and manifest.capabilities["likelihood"] == "bound"


def test_an_interrupted_run_is_the_run_that_was_not_bit_for_bit(data_folder, tmp_path):
    recipe = tiny_recipe(data_folder, checkpoint__keep_last=5)
    loop.fit(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_00000008")  # as if it had died after its fourth step
    loop.fit(recipe, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert any(name.startswith("ema.") for name in tensors(tmp_path / "cut"))


def test_accumulation_changes_no_mask_and_the_loss_by_rounding_only(data_folder, tmp_path):
    for micro in (12, 3):
        loop.fit(tiny_recipe(data_folder, training__micro_batch_size=micro), tmp_path / f"m{micro}")
    whole, parts = losses(tmp_path / "m12"), losses(tmp_path / "m3")
    assert all(parts[step] == pytest.approx(whole[step], rel=2e-5) for step in whole)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_draws_of_a_global_batch_do_not_depend_on_workers_or_micro_batches(data_folder, world_size, micro):
    recipe = tiny_recipe(data_folder, training__global_batch_size=7, training__micro_batch_size=micro)
    objective, rows = Masked(), read_split(data_folder, "train", 7)
    [whole] = micro_batches(
        tiny_recipe(data_folder, training__global_batch_size=7, training__micro_batch_size=7),
        objective,
        rows,
        5,
        0,
        1,
        torch.device("cpu"),
    )
    masks, ids, counts = [], [], 0
    for rank, share in enumerate(np.array_split(np.arange(7), world_size)):
        batches = micro_batches(recipe, objective, [rows[i] for i in share], 5, rank, world_size, torch.device("cpu"))
        assert len(batches) == num_micro_steps(recipe, world_size)  # every rank runs equally many
        for batch in batches:
            counts += objective.count(batch.draw)
            if objective.count(batch.draw):
                masks.append(batch.draw.is_masked)
                ids.append(batch.x_0)
    assert torch.equal(torch.cat(ids), whole.x_0)
    assert torch.equal(torch.cat(masks), whole.draw.is_masked)
    assert counts == objective.count(whole.draw)


def test_validation_and_search_are_on_held_out_rows_of_every_source(data_folder, tmp_path):
    """As many of each, whatever the other of the two asks for; what a small source lacks, the others make up for."""
    tokenizer, chance = load_data_tokenizer(data_folder), random.Random(0)
    texts = [
        [" ".join(chance.choices(WORDS, k=60)) for _ in range(count)] for count in (60, 6, 60)
    ]  # no row comes twice
    folders = [
        make_data(tmp_path / str(number), documents=documents, held_out=0.4, tokenizer=tokenizer)
        for number, documents in enumerate(texts)
    ]
    sources = [Source(path=folder) for folder in folders]
    indexes = open_sources(sources)
    few = indexes[1].splits["held_out"].sequences
    assert 2 < few < 25

    def counts(num_rows):
        rows = held_out_sequences(sources, indexes, num_rows)
        paths = [
            next(path for path in folders if any(np.array_equal(row.input_ids, own.input_ids) for own in held[path]))
            for row in rows
        ]
        return [paths.count(folder) for folder in folders]

    held = {folder: read_split(folder, "held_out") for folder in folders}
    assert counts(0) == [0, 0, 0] and counts(2) == [1, 1, 0] and counts(7) == [3, 2, 2]
    assert counts(3 * few + 4) == [few + 2, few, few + 2]
    assert counts(10**6) == [len(held[folder]) for folder in folders]


def test_a_search_or_the_best_checkpoints_need_held_out_sequences(data_folder, tmp_path, caplog):
    folder = make_data(tmp_path / "data", held_out=0.0)
    searching = {"objective": {"name": "block", "block_tokens": 4}, "curriculum__clip_search": {"every_steps": 2}}
    for changes, key in ((searching, "curriculum.clip_search"), ({"checkpoint__keep_best": 1}, "checkpoint.keep_best")):
        with pytest.raises(
            UserError,
            match=f"{key} measures held-out sequences, and data.sources have none; build the data with a larger",
        ):
            loop.fit(tiny_recipe(folder, **changes), tmp_path / key)
    assert "validation" not in loop.fit(
        tiny_recipe(folder, training__steps=1, optimizer__warmup_steps=0), tmp_path / "run"
    )
    assert "validation.sequences=6, but data.sources have no held-out sequences: validation is skipped" in caplog.text


def test_annealing_is_the_papers(data_folder):
    recipe = tiny_recipe(data_folder, curriculum__annealing={"pattern": "bernoulli", "steps": 5})
    assert [annealing_ratio(recipe, step) for step in (0, 3, 4, 7)] == [0.2, 0.8, 1.0, 1.0]


def test_precision_auto_is_resolved_when_the_run_starts_recorded_and_kept_on_resume(data_folder, tmp_path, monkeypatch):
    recipe = tiny_recipe(data_folder, training__precision="auto", training__steps=4)
    loop.fit(recipe, tmp_path / "run")
    recorded = commit.read_manifest(listing.latest(str(tmp_path / "run"))).recipe
    assert recorded["training"]["precision"] == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    gpu = torch.device("cuda")
    assert with_precision(recipe, gpu, None).training.precision == "bf16"
    assert with_precision(recipe, gpu, recorded).training.precision == "fp32"
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 6})})
    with pytest.raises(UserError, match="training.steps: the checkpoint has 4, the recipe has 6") as error:
        loop.fit(longer, tmp_path / "run")
    assert "training.precision" not in str(error.value)  # `auto` of the recipe is the recorded precision


def test_bf16_and_an_untied_gpt2_without_shift_train(data_folder, tmp_path):
    recipe = tiny_recipe(
        data_folder,
        training__precision="bf16",
        model__architecture__family="gpt2",
        model__architecture__tie_embeddings=False,
        objective__shift=False,
    )
    loop.fit(recipe, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert curve[8] < curve[1]
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path / "run").values())


def test_activation_checkpointing_changes_nothing_but_memory(data_folder, tmp_path):
    for name, remat in (("plain", False), ("remat", True)):
        loop.fit(tiny_recipe(data_folder, model__activation_checkpointing=remat, training__steps=4), tmp_path / name)
    assert losses(tmp_path / "remat") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


@pytest.mark.slow
def test_compiled_layers_train_alike(data_folder, tmp_path):
    for name, compiled in (("plain", False), ("compiled", True)):
        loop.fit(tiny_recipe(data_folder, model__compile=compiled, training__steps=4), tmp_path / name)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(data_folder, tmp_path):
    with pytest.raises(FloatingPointError, match="the last checkpoint is valid"):
        loop.fit(
            tiny_recipe(data_folder, "explodes", optimizer__learning_rate=1e30, optimizer__warmup_steps=0),
            tmp_path / "run",
        )
    latest = listing.latest(str(tmp_path / "run"))
    assert latest is None or commit.verify(latest) == []


def test_a_damaged_checkpoint_and_other_data_are_refused(data_folder, base, tmp_path):
    recipe = tiny_recipe(data_folder)
    loop.fit(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/step_00000008")
    other = make_data(tmp_path / "other", vocab=310)
    with pytest.raises(UserError, match="was trained with tokenizer"):
        loop.fit(tiny_recipe(other), tmp_path / "run")
    with pytest.raises(UserError, match="was made with tokenizer"):
        loop.fit(tiny_recipe(other, model__architecture=None, model__base=str(base[0])), tmp_path / "new")
    victim = max(
        Path(listing.latest(str(tmp_path / "run"))).glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    with pytest.raises(DamageError, match="damaged"):
        loop.fit(recipe, tmp_path / "run")


def test_a_run_on_shards_in_s3_is_the_run_on_the_disk(s3, data_folder, tmp_path):
    for path in sorted(Path(data_folder).rglob("*")):
        if path.is_file():
            storage.write(f"{s3}/data/{path.relative_to(data_folder)}", path.read_bytes())
    for name, source in (("disk", data_folder), ("s3", f"{s3}/data")):
        loop.fit(tiny_recipe(source, training__steps=4), tmp_path / name)
    assert losses(tmp_path / "s3") == losses(tmp_path / "disk")
    assert (tmp_path / "s3/tokenizer/tokenizer.json").is_file()


def test_wandb_offline_writes_its_file(data_folder, tmp_path):
    loop.fit(tiny_recipe(data_folder, tracking__wandb="offline", training__steps=2), tmp_path / "run")
    assert list((tmp_path / "run").rglob("*.wandb"))


def test_a_missing_wandb_is_an_error_that_says_what_to_install(data_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="tracking.wandb=offline needs the package wandb.*pip install wandb"):
        loop.fit(tiny_recipe(data_folder, tracking__wandb="offline", training__steps=2), tmp_path / "run")
