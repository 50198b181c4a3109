"""The schema of sampling options: every surface has the same fields, ranges, defaults and descriptions."""

import inspect
import typing

import pytest
import typer

from dlm_ray.cli.main import app
from dlm_ray.config.errors import UserError
from dlm_ray.config.sampling import (
    PYTHON_ONLY,
    RULE_NAMES,
    RULE_OF,
    LocalSampling,
    ResolvedSampling,
    Sampling,
    ServedSampling,
    option_errors,
)
from dlm_ray.generation.sampling import SamplingOptions, SamplingTarget, resolve_sampling
from dlm_ray.serving.http.protocol import Chat, Completion, Infill

RULES = ("confidence", "ancestral", "threshold", "factor", "entropy_bounded")
TARGET = SamplingTarget("whole", RULES, Sampling(), sequence_length=32, block_tokens=None)
OUT_OF_RANGE = [
    ("steps", 0),
    ("steps", 2**20 + 1),
    ("grid", "log"),
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("temperature", float("nan")),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("threshold", -0.1),
    ("factor", 0.0),
    ("factor", float("inf")),
    ("entropy_bound", -1.0),
    ("remask", 1.1),
]


def sample_parameters():
    [command] = [c for c in typer.main.get_command(app).commands.values() if c.name == "sample"]
    return {parameter.name: parameter for parameter in command.params}


@pytest.mark.parametrize("request_model", [Completion, Chat, Infill])
def test_requests_have_the_options_of_the_schema_with_its_ranges_and_descriptions(request_model):
    ours, schema = request_model.model_json_schema()["properties"], ServedSampling.model_json_schema()["properties"]
    assert {name: ours[name] for name in schema} == schema
    assert set(ServedSampling.model_fields) <= set(request_model.model_fields)


def test_the_command_line_has_the_options_of_the_schema_with_its_descriptions():
    parameters = sample_parameters()
    for name, info in LocalSampling.model_fields.items():
        assert (name in parameters) == (name not in PYTHON_ONLY)
        if name in parameters:
            assert " ".join(info.description.split()).replace("`", "") in parameters[name].help
            assert parameters[name].default is None  # the recipe's value


def test_python_has_the_options_of_the_schema():
    hints = typing.get_type_hints(SamplingOptions)
    assert set(LocalSampling.model_fields) <= set(hints)
    source = inspect.getsource(SamplingOptions)
    for name in LocalSampling.model_fields:
        assert type(None) in typing.get_args(hints[name]), f"{name} may be None: {source}"


def test_resolved_options_have_the_fields_of_the_schema_and_its_defaults():
    assert set(ResolvedSampling.model_fields) == set(LocalSampling.model_fields)
    resolved = resolve_sampling({}, TARGET, 20)
    for name, info in LocalSampling.model_fields.items():
        if name not in ("rule", "steps", "block_tokens"):
            assert getattr(resolved, name) == info.default
    assert (resolved.rule, resolved.steps, resolved.block_tokens) == ("confidence", 20, None)


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_the_recipe_python_and_requests_alike(name, value):
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})
    with pytest.raises(ValueError, match=name):
        Completion(model="m", **{name: value})
    with pytest.raises(UserError, match=f"{name}={value}: must be ") as error:
        resolve_sampling({name: value, "rule": RULE_OF.get(name)}, TARGET, 20)
    assert error.value.field == name and error.value.allowed.startswith("must be ")
    assert error.value.value == value or value != value


def test_all_errors_are_reported_at_once_and_the_first_names_the_field():
    with pytest.raises(UserError) as error:
        resolve_sampling({"rule": "best", "top_p": 0, "stop": ["never"]}, TARGET, 20)
    assert error.value.field == "top_p"
    for message in ("top_p=0: must be", "rule=best: does not belong", "stop=never: must be one of end, entropy"):
        assert message in str(error.value)


def test_a_null_option_of_a_request_is_left_out():
    request = Completion(model="m", temperature=None, steps=None, top_p=0.5)
    assert request.options() == {"top_p": 0.5}


def test_a_request_cannot_name_a_custom_rule_or_a_rule_that_does_not_exist():
    for rule in ("package.module:Class", "best"):
        with pytest.raises(ValueError, match="must be one of left_to_right"):
            Completion(model="m", rule=rule)
    assert all(Completion(model="m", rule=rule).options() == {"rule": rule} for rule in RULE_NAMES)


def test_a_recipe_may_name_a_custom_rule_for_masked_and_block_objectives():
    assert Sampling(rule="package.module:Class").contradictions("masked") == []
    assert Sampling(rule="package.module:Class").contradictions("block") == []
    [error] = Sampling(rule="package.module:Class").contradictions("autoregressive")
    assert "does not belong to objective.name=autoregressive" in error
    [error] = Sampling(rule="best").contradictions("masked")
    assert "allowed are confidence" in error


def test_values_in_range_have_no_errors():
    assert option_errors({"temperature": 100, "top_p": 1, "steps": 2**20, "stop": ["end"], "candidates": 4}) == []
