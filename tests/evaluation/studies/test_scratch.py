"""The study of adaptation against training from scratch: what its arms share, and that they run."""

import pytest
from dlm_ray.evaluation.studies import runner, scratch, setup
from helpers.recipes import tiny_recipe

from dlm_ray.training import loop


def test_the_arms_differ_in_the_base_the_objective_and_the_rate_that_scratch_needs():
    adapted, from_scratch, continued = (dict(arm.settings) for arm in scratch.build_study(3, 240).arms)
    assert adapted["training"] == from_scratch["training"] == continued["training"]
    assert adapted["objective"] == from_scratch["objective"] and continued["objective"] == {"name": "autoregressive"}
    assert continued["optimizer"] == adapted["optimizer"]
    assert from_scratch["optimizer"] == {**adapted["optimizer"], "learning_rate": 2e-3, "warmup_share": 0.125}
    assert set(from_scratch["model"]) == {"architecture"}


@pytest.mark.long
def test_all_arms_run_and_are_compared_with_training_from_scratch(data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "HELD_OUT_SEQUENCES", 4)
    monkeypatch.setattr(scratch, "DRAWS_PER_SEQUENCE", 2)
    data, base = str(data_folder), str(tmp_path / "base")
    loop.fit(tiny_recipe(data, objective__name="autoregressive", training__steps=2), base)
    small = scratch.build_study(1, 2)
    records = runner.run(small, lambda arm, seed, folder: scratch.run_arm(arm, seed, folder, data, base), tmp_path)
    assert [record.error for record in records] == [None] * 3
    assert len({record.metrics["bits_per_byte"] for record in records}) == 3
    assert len(scratch.notes(data, 2)) == 2 and setup.hardware()
