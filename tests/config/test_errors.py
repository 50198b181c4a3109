"""User errors: structured fields, a neutral message, and the same message in the command line's words."""

import pickle

import pytest

from dlm_ray.config.errors import DamageError, UserError

FLAGS = {"top_p": "--top-p", "rule": "--rule", "prefix": "--prefix", "suffix": "--suffix", "host": "--host"}


def test_an_error_about_one_value_carries_it_and_what_is_allowed():
    error = UserError.of("top_p", 2, "must be more than 0 and at most 1")
    assert (error.field, error.value, error.allowed) == ("top_p", 2, "must be more than 0 and at most 1")
    assert str(error) == "top_p=2: must be more than 0 and at most 1"
    assert str(UserError.of("rule", "x", "must be one of a, b", "or leave it out")).endswith("a, b; or leave it out")


@pytest.mark.parametrize(
    ("message", "worded"),
    [
        ("top_p=2: must be at most 1", "--top-p 2: must be at most 1"),
        ("`prefix` and `suffix` go together", "--prefix and --suffix go together"),
        ("top_p=0.5 belongs to rule=top_p", "--top-p 0.5 belongs to --rule top_p"),
        ("http.host=0.0.0.0 with training.rule=x", "http.host=0.0.0.0 with training.rule=x"),
        ("`unknown` and other=3 stay", "`unknown` and other=3 stay"),
    ],
)
def test_the_command_line_writes_parameters_as_its_flags_and_leaves_recipe_keys(message, worded):
    assert UserError(message).worded(FLAGS) == worded


def test_the_fields_survive_pickling_between_processes():
    error = pickle.loads(pickle.dumps(DamageError.of("path", "x.tar", "must be a shard")))
    assert type(error) is DamageError and (error.field, str(error)) == ("path", "path=x.tar: must be a shard")
