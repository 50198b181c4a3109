"""Custom objectives, processes and schedules are trained, restored, sampled, scored, served and exported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.recipes import tiny_recipe
from helpers.service import client, hosted
from torch import nn

import dlm_ray
from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.export import export
from dlm_ray.config.errors import UserError
from dlm_ray.config.imports import import_class
from dlm_ray.config.objective import OBJECTIVES, SCHEDULES
from dlm_ray.config.server import Server
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion import likelihood, objectives, schedules
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.serving.pinning import pinned
from dlm_ray.training import loop, setup


class Scaled(Masked):
    """Masked diffusion with a learned scale of the hidden states."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.log_scale = nn.Parameter(torch.tensor([0.25]))

    def rows(self, denoiser, batch):
        return super().rows(denoiser, batch) * self.log_scale.exp()


class Cubic(schedules.Polynomial):
    """A custom schedule: alpha(t) = 1 - t ** 3."""

    def __init__(self):
        super().__init__(3.0)


class Weighted(nn.Module):
    """A custom process: masks by the absorbing one, and a parameter of its own in the network's input."""

    def __init__(self, masks, width):
        super().__init__()
        self.masks, self.mark = masks, nn.Parameter(torch.zeros(width))

    @classmethod
    def build(cls, settings, facts):
        return cls(Absorbing.build(settings, facts), facts.width)

    def draw(self, key, maskable):
        return self.masks.draw(key, maskable)

    def evaluation_draw(self, seed, keys, t, maskable):
        return self.masks.evaluation_draw(seed, keys, t, maskable)

    def inputs(self, denoiser, batch):
        return denoiser.embed(self.masks.inputs(denoiser, batch)) + self.mark * batch.draw.is_masked[..., None]


class Incomplete:
    kind, canvas, is_causal, likelihood = "masked", "whole", False, "bound"


OWN = {
    "objective": {"objective__name": f"{__name__}:Scaled"},
    "process": {"objective__process": f"{__name__}:Weighted"},
    "schedule": {"objective__schedule": {"name": f"{__name__}:Cubic", "epsilon_0": 1e-3}},
}
LEARNED = {"objective": {"log_scale"}, "process": {"process.mark"}, "schedule": set()}


@pytest.fixture(scope="module", params=OWN)
def trained(request, data_folder, tmp_path_factory):
    recipe = tiny_recipe(data_folder, "own", training__steps=6, ema=None, **OWN[request.param])
    run_dir = tmp_path_factory.mktemp("custom") / request.param
    loop.fit(recipe, run_dir)
    return request.param, recipe, run_dir


def test_the_class_path_and_its_parameters_are_in_the_checkpoint_and_restored_from_it(trained):
    part, recipe, run_dir = trained
    directory = listing.latest(str(run_dir))
    manifest, model = commit.read_manifest(directory), dlm_ray.load(run_dir)
    assert manifest.recipe["objective"] == recipe.objective.model_dump(mode="json")
    parameters = dict(model.objective.named_parameters())
    assert parameters.keys() == LEARNED[part]
    fresh = setup.build_objective(recipe, setup.Network.from_manifest(manifest.model), 32)
    assert type(model.objective) is type(fresh) and type(model.objective.process) is type(fresh.process)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, commit.read_tensor(directory, f"objective.{name}"))
        assert not torch.equal(parameter, dict(fresh.named_parameters())[name])  # it was trained


def test_the_bound_of_the_restored_objective_is_that_of_validation_on_the_same_draws(trained, data_folder):
    _, recipe, run_dir = trained
    model = dlm_ray.load(run_dir)
    sequences = read_split(data_folder, "held_out", recipe.validation.sequences)
    x_0 = np.stack([sequence.input_ids for sequence in sequences]).astype(np.int64)
    document_ids = np.stack([sequence.document_ids for sequence in sequences])
    nats = likelihood.token_nats(
        model.denoiser,
        model.objective,
        x_0,
        document_ids,
        lambda ids: Visibility("bidirectional", document_ids=documents_apart(ids, True, model.device)),
        model.device,
        num_draws=4,
        seed=recipe.seed,
    ).nats
    lines = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    validated = [line["validation"]["nats_per_token"] for line in lines if "validation" in line][-1]
    assert nats.sum() / maskable_positions(document_ids).sum() == pytest.approx(validated, rel=1e-5)


def test_an_export_is_loaded_scored_and_sampled_as_the_checkpoint_is(trained, data_folder, tmp_path):
    _, _, run_dir = trained
    model, again = dlm_ray.load(run_dir), dlm_ray.load(export(str(run_dir), str(tmp_path / "exported")))
    assert type(again.objective) is type(model.objective)
    assert again.objective.state_dict().keys() == model.objective.state_dict().keys()
    options = {"length_tokens": 6, "steps": 3, "seed": 1}
    assert again.sample("the model", **options) == model.sample("the model", **options)
    scores = [
        loaded.score(data_folder, max_sequences=4, draws_per_sequence=2).bits_per_byte for loaded in (model, again)
    ]
    assert scores[0] == scores[1]


async def served_score(app):
    async with client(app) as http:
        answer = await http.post("/v1/score", json={"model": "tiny", "text": "the model", "draws": 2, "seed": 3})
    return answer


def test_it_is_served_and_its_parameters_change_the_score(trained):
    import asyncio

    part, _, run_dir = trained
    assert pinned(Server(checkpoint=str(run_dir))).served
    with hosted(run_dir) as (_, app):
        answer = asyncio.run(served_score(app))
    assert answer.status_code == 200, answer.text


def test_what_cannot_be_imported_or_restored_is_refused_with_what_is_missing(data_folder, tmp_path, monkeypatch):
    recipe = tiny_recipe(data_folder, "own", objective__name=f"{__name__}:Scaled", training__steps=2)
    loop.fit(recipe, tmp_path / "run")
    folder = export(str(tmp_path / "run"), str(tmp_path / "exported"))
    this = __import__(__name__)
    monkeypatch.setattr(this, "Scaled", Masked)
    with pytest.raises(
        UserError, match=r"stores the parameters \['log_scale'\] of objective.name=.*:Scaled, but the class has \[\]"
    ):
        dlm_ray.load(tmp_path / "run")
    monkeypatch.delattr(this, "Scaled")
    for load in (
        lambda: dlm_ray.load(tmp_path / "run"),
        lambda: dlm_ray.load(folder),
        lambda: pinned(Server(checkpoint=str(tmp_path / "run"))),
    ):
        with pytest.raises(UserError, match=f"cannot be restored: .*module {__name__} has no class Scaled"):
            load()
    config = json.loads((folder / "config.json").read_text())
    config["dlm_ray"]["objective"] = "no.such.package:Scaled"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="module no.such.package cannot be imported .*PYTHONPATH"):
        dlm_ray.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__name": "maskd"}, "objective.name=maskd; allowed are autoregressive, masked"),
        ({"objective__name": f"{__name__}:Nothing"}, "has no class Nothing"),
        ({"objective__name": f"{__name__}:Incomplete"}, "class Incomplete lacks build, restore, draw"),
        ({"objective__process": "no.such:Class"}, "objective.process=no.such:Class: module no.such cannot be imported"),
        ({"objective__schedule": {"name": f"{__name__}:Incomplete"}}, "lacks alpha, alpha_prime"),
        ({"objective": {"name": f"{__name__}:Scaled", "block_tokens": 4}}, "objective.block_tokens=4 is not used by"),
        ({"objective__name": f"{__name__}:Scaled", "sampling__rule": "greedy"}, "sampling.rule=greedy does not belong"),
    ],
)
def test_a_wrong_class_or_key_is_refused_before_training(changes, message, data_folder):
    recipe = tiny_recipe(data_folder, "wrong", **changes)
    network = setup.Network({"vocab_size": 12, "hidden_size": 8}, 11, True, False)
    with pytest.raises(UserError, match=message):
        setup.build_objective(recipe, network, 32)


def test_the_table_of_the_configuration_and_the_classes_agree():
    assert objectives.CLASSES.keys() == OBJECTIVES.keys() and schedules.NAMES == SCHEDULES
    for name, spec in OBJECTIVES.items():
        assert objectives.CLASSES[name].canvas == spec.canvas
        assert OBJECTIVES[objectives.CLASSES[name].kind].rules == spec.rules
    assert import_class("dlm_ray.diffusion.objectives.masked:Masked", "objective.name") is Masked
