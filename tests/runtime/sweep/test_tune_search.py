"""Optuna over a conditional space: what it suggests is of the space, and it learns from trials of an earlier call."""

from dlm_ray.config.sweep import Sweep
from dlm_ray.runtime.sweep.search import Listed, Tpe

SPACE = {
    "objective.block_tokens": {"grid": [4, 16]},
    "objective.clip": {"by": "objective.block_tokens", "cases": {"4": {"choice": [None, {"beta": 0.5, "omega": 1.0}]}}},
    "optimizer.learning_rate": {"loguniform": [1e-5, 1e-1]},
}
SWEEP = Sweep(name="s", recipe="quickstart", space=SPACE, search={"name": "optuna", "trials": 40})


def bound(settings):
    return abs(settings["optimizer.learning_rate"] / 1e-2 - 1) + (settings["objective.block_tokens"] == 16)


def suggestions(searcher, count, first=0):
    found = []
    for number in range(count):
        found.append(searcher.suggest(str(first + number)))
        searcher.on_trial_complete(str(first + number), {"bits_per_byte": bound(found[-1]["settings"])})
    return found


def test_suggestions_stay_in_the_space_and_approach_its_optimum():
    found = suggestions(Tpe(SWEEP, [], [], 0), 40)
    assert [one["number"] for one in found] == list(range(40))
    for settings in (one["settings"] for one in found):
        assert ("objective.clip" in settings) == (settings["objective.block_tokens"] == 4)
        assert 1e-5 <= settings["optimizer.learning_rate"] <= 1e-1
    early, late = (sum(bound(one["settings"]) for one in part) / 10 for part in (found[:10], found[-10:]))
    assert late < early / 2


def test_the_searcher_continues_from_the_results_of_an_earlier_call():
    before = suggestions(Tpe(SWEEP, [], [], 0), 20)
    begun = (
        20,
        {"objective.block_tokens": 4, "objective.clip": {"beta": 0.5, "omega": 1.0}, "optimizer.learning_rate": 0.004},
    )
    ended = [(one["settings"], bound(one["settings"])) for one in before] + [
        ({"objective.block_tokens": 16, "optimizer.learning_rate": 0.1}, None)
    ]
    found = suggestions(Tpe(SWEEP, ended, [begun], 21), 8)
    assert (found[0]["number"], found[0]["settings"]) == begun and found[1]["number"] == 21
    assert sum(one["settings"]["objective.block_tokens"] == 4 for one in found) >= 6


def test_a_list_of_trials_ends_with_finished():
    listed = Listed([(3, {"a": 1})])
    assert listed.suggest("x") == {"number": 3, "settings": {"a": 1}} and listed.suggest("y") == Listed.FINISHED
