"""What the speed measurements stand on: rounds that are paired, and a random checkpoint that loads as a block model."""

from dlm_ray.evaluation.speed import networks, serving, timing

from dlm_ray.config.recipe import Architecture
from dlm_ray.generation.loading import load


def test_cases_alternate_within_a_round_and_the_first_round_is_discarded():
    calls = []

    def case(name):
        return lambda number: calls.append((name, number)) or float(10 * number + len(name))

    measured = timing.interleaved({"a": case("a"), "bb": case("bb")}, 2)
    assert calls == [("a", 0), ("bb", 0), ("a", 1), ("bb", 1), ("a", 2), ("bb", 2)]
    assert measured == {"a": [11.0, 21.0], "bb": [12.0, 22.0]}
    assert timing.paired_ratios(measured["bb"], measured["a"]) == [12 / 11, 22 / 21]


def test_the_checkpoint_of_the_serving_measurement_loads_as_a_block_model(tmp_path):
    architecture = Architecture(width=16, num_layers=1, num_heads=2, max_positions=32)
    model = load(serving.write_checkpoint(tmp_path, architecture, 300))
    assert not model.is_causal and model.denoiser.mask_id == 300 and model.sequence_length == networks.CONTEXT
    assert model.objective.block_tokens == networks.BLOCK_TOKENS
