"""The gates of model families: suitable families pass; each kind of unsuitable network is refused with a reason."""

import pytest

from dlm_ray.config.errors import UserError
from dlm_ray.config.recipe import FAMILIES
from dlm_ray.models.gates import GATES, check_family, config_of, tiny


def failures(config):
    return {result.name: result.failure for result in check_family(config) if result.failure}


@pytest.mark.parametrize("family", [*FAMILIES, "olmo2", "phi3", "smollm3", "granite", "gemma3_text"])
def test_a_suitable_family_passes_every_gate(family):
    results = check_family(config_of(family))
    assert [result.name for result in results] == ["builds", *GATES]
    assert not failures(config_of(family))


def test_logits_that_the_family_scales_or_caps_are_refused():
    assert set(failures(config_of({"model_type": "granite", "logits_scaling": 8.0}))) == {
        "causal logits equal the model's own"
    }
    assert "causal logits equal the model's own" in failures(config_of("gemma2"))


def test_files_whose_tensors_have_other_names_are_refused():
    [(name, failure)] = failures(config_of("qwen3_moe")).items()
    assert name == "files have the names of the parameters" and "experts.0" in failure


def test_a_network_that_does_not_build_is_one_failure_with_its_reason():
    [result] = check_family(config_of("falcon"))
    assert result.name == "builds" and result.failure.startswith("KeyError")


def test_a_tiny_configuration_keeps_what_is_no_size():
    config = tiny(config_of({"model_type": "granite", "embedding_multiplier": 12.0}))
    assert config.embedding_multiplier == 12.0
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, 62)


def test_an_unknown_model_type_is_refused():
    with pytest.raises(UserError, match="does not know the model type 'no_such_model'"):
        config_of("no_such_model")
