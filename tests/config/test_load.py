"""Loading recipes: every mistake at once, with the nearest key and the fix; and what a recipe's hash depends on."""

import json

import pytest

from dlm_ray.config.errors import UserError
from dlm_ray.config.load import dump, load_recipe, recipe_hash, run_name, shipped
from dlm_ray.config.mistakes import all_keys
from dlm_ray.config.recipe import Recipe, steps_of_share

GOOD = """
name: test
model: {architecture: {family: llama, width: 32, num_layers: 2, num_heads: 2}}
data: {sources: [{path: somewhere}]}
training: {steps: 10, global_batch_size: 4, micro_batch_size: 2}
"""
# `adapt` is shipped without a model and without data: the user gives both.
GIVEN = {"adapt": ["model.base=gpt2", "data.sources.0.path=data/mine"]}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return str(path)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name, GIVEN.get(name, ())).name


def test_overrides_are_yaml_and_reach_into_lists(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "optimizer.learning_rate=1e-4",
            "data.sources.0.path=other",
            "data.sources.1={path: more, weight: 2}",
            "ema.decay=0.9",
        ],
    )
    assert recipe.optimizer.learning_rate == 1e-4
    assert [source.path for source in recipe.data.sources] == ["other", "more"]
    assert recipe.ema is not None and load_recipe(recipe_file, ["ema.decay=0.9", "ema=null"]).ema is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stps=3", "training.stps is unknown; did you mean training.steps?"),
        ("learning_rate=3", "learning_rate is unknown; did you mean optimizer.learning_rate?"),
        ("qqq=1", "qqq is unknown; allowed here are name, seed, model"),
        ("training.steps=many", "training.steps='many': input should be a valid integer"),
        ("training.steps=0", "training.steps=0: input should be greater than 0"),
        ("model.architecture.family=lama", "model.architecture.family='lama'; allowed are 'gpt2', 'llama'"),
        ("model.mask_token=-3", "model.mask_token"),
        ("name=a b", "name='a b': string should match pattern"),
        ("data.sources.5.path=x", "there is no '5' to set something in"),
        ("steps", "is not of the form key=value"),
        ("training.steps=[", "the value is not YAML"),
        ("data.sources=[]", "data.sources"),
        ("training.steps=yes", "training.steps=True: input should be a number, not true or false"),
        ("optimizer.learning_rate=on", "optimizer.learning_rate=True: input should be a number"),
        ("parallelism.workers=true", "parallelism.workers=True"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate=inf: input should be a finite number"),
        ("data.sources.0.weight=.inf", "data.sources.0.weight=inf: input should be a finite number"),
        ("objective.confidence_weight=.nan", "objective.confidence_weight=nan: input should be a finite number"),
    ],
)
def test_a_wrong_override_says_what_is_allowed(recipe_file, override, message):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.base=gpt2"], "exactly one of model.base and model.architecture is needed, both are set"),
        (
            ["model.architecture=null"],
            "model.base is missing and model.architecture, too; set model.base to the model to start from",
        ),
        (["model.architecture.width=33"], "not divisible by model.architecture.num_heads"),
        (["model.architecture.num_key_value_heads=3"], "not a multiple"),
        (["model.architecture.family=gpt2", "model.architecture.num_key_value_heads=1"], "not for family gpt2"),
        (["objective.schedule.name=polynomial"], "objective.schedule.exponent=None"),
        (["objective.name=autoregressive", "objective.shift=false"], "objective.shift=false is impossible"),
        (["objective.clip={beta: 0.8, omega: 0.3}"], "beta=0.8, omega=0.3; allowed is 0 <= beta < omega <= 1"),
        (["objective.clip={beta: 0.5, omega: 0.5}"], "allowed is 0 <= beta < omega <= 1"),
        (["objective.clip={beta: -0.1, omega: 1.5}"], "allowed is 0 <= beta < omega <= 1"),
        (
            ["objective.name=genmd4", "objective.schedule.name=cosine"],
            "not used by objective.name=genmd4, only by block, d3pm, masked, sedd, tauldr",
        ),
        (["objective.name=ssd_lm", "objective.schedule.name=log"], "not used by objective.name=ssd_lm"),
        (
            ["objective.mask_sampler=count", "objective.schedule.name=cosine"],
            "cannot be combined with objective.mask_sampler=count",
        ),
        (
            ["objective.name=sedd", "objective.num_timesteps=10"],
            "objective.num_timesteps=10 is not used by objective.name=sedd",
        ),
        (["objective.num_timesteps=10", "objective.clip={beta: 0.3, omega: 0.8}"], "discrete time"),
        (["objective.complementary=true"], "needs an even objective.draws_per_sequence (it is 1)"),
        (["objective.autoregressive_weight=0.1", "objective.shift=false"], "needs objective.shift=true"),
        (["objective.alignment_weight=10"], "needs model.base"),
        (
            ["objective.name=sedd", "sampling.rule=state_dependent"],
            "does not belong to objective.name=sedd; allowed are tweedie, confidence",
        ),
        (["objective.name=ssd_lm", "sampling.rule=ancestral"], "allowed are sampled, greedy, multi_hot"),
        (["model.architecture.zero_head=true", "model.architecture.tie_embeddings=true"], "needs a head of its own"),
        (["curriculum.annealing.pattern=bernoulli"], "set steps > 0 with a pattern"),
        (
            ["curriculum.annealing={pattern: window, steps: 99}"],
            "curriculum.annealing.steps=99 exceeds training.steps=10",
        ),
        (["curriculum.annealing={pattern: none, share: 0.3}"], "neither with pattern none"),
        (["curriculum.annealing={pattern: window, share: 0.3, steps: 3}"], "are both set; remove either"),
        (["curriculum.annealing={pattern: window, steps: 9}", "objective.name=autoregressive"], "stays causal"),
        (["optimizer.lr_schedule=warmup_stable_decay"], "warmup_stable_decay needs one of them"),
        (["optimizer.decay_share=0.1"], "the other schedules have neither"),
        (
            ["optimizer.warmup_share=0.1", "optimizer.warmup_steps=2"],
            "optimizer.warmup_steps=2 and optimizer.warmup_share=0.1 are both set; remove either",
        ),
        (
            ["optimizer.lr_schedule=warmup_stable_decay", "optimizer.warmup_share=0.6", "optimizer.decay_share=0.5"],
            "optimizer.warmup_share=0.6 + optimizer.decay_share=0.5 exceed 1",
        ),
        (["optimizer.warmup_steps=11"], "exceed training.steps=10"),
        (["parallelism.workers={min: 3, max: 2}"], "parallelism.workers: min=3 exceeds max=2"),
        (["parallelism.workers={min: 1, max: 5}"], "a worker would have no sequence"),
        (["parallelism.workers={mn: 1, max: 2}"], "did you mean parallelism.workers.min?"),
        (
            ["checkpoint.keep_best=1", "validation.every_steps=30"],
            "checkpoint.keep_best=1 needs validation at every checkpoint",
        ),
        (["parallelism.workers=5"], "a worker would have no sequence"),
        (["objective.name=block"], "objective.block_tokens is missing"),
        (["objective.block_tokens=4"], "is not used by objective.name=masked, only by block"),
        (
            ["curriculum.block_sizes=[{block_tokens: 4, steps: 2}]"],
            "curriculum.block_sizes is for objective.name=block",
        ),
        (["curriculum.clip_search={every_steps: 5}"], "curriculum.clip_search is for objective.name=block"),
        (["objective.clip={beta: 0.3, omega: 0.8, enforce: counts}"], "enforce=counts is for objective.name=block"),
        (
            ["objective={name: block, block_tokens: 2, clip: {beta: 0.55, omega: 0.95, enforce: counts}}"],
            "[0.55, 0.95] with enforce=counts is impossible with blocks of 2: no whole number of masked tokens is "
            "between 1.1 and 1.9",
        ),
        (
            [
                "objective={name: block, block_tokens: 16, clip: {beta: 0.55, omega: 0.95, enforce: counts}}",
                "curriculum.block_sizes=[{block_tokens: 2, steps: 4}]",
            ],
            "is impossible with blocks of 2",
        ),
        (
            ["objective={name: block, block_tokens: 4}", "curriculum.block_sizes=[{block_tokens: 1, steps: 11}]"],
            "would never be trained",
        ),
        (
            [
                "objective={name: block, block_tokens: 4, mask_sampler: count}",
                "curriculum.clip_search={every_steps: 5}",
            ],
            "chooses objective.clip",
        ),
        (
            ["objective={name: block, block_tokens: 4}", "curriculum.block_sizes=[{block_tokens: 1}]"],
            "curriculum.block_sizes.0 has no length; set curriculum.block_sizes.0.steps",
        ),
        (
            [
                "objective={name: block, block_tokens: 4}",
                "curriculum.block_sizes=[{block_tokens: 1, steps: 2, share: 0.1}]",
            ],
            "curriculum.block_sizes.0.steps=2 and curriculum.block_sizes.0.share=0.1 are both set",
        ),
        (["objective={name: block, block_tokens: 4}", "model.attention=flash"], "set model.attention=auto"),
        (["objective={name: block, block_tokens: 1}", "curriculum.clip_search={every_steps: 5}"], "nothing to search"),
        (
            [
                "objective={name: block, block_tokens: 4, complementary: true, draws_per_sequence: 2}",
                "curriculum.clip_search={every_steps: 5}",
            ],
            "curriculum.clip_search chooses objective.clip, and objective.complementary=true needs",
        ),
        (
            ["objective={name: block, block_tokens: 4}", "curriculum.clip_search={every_steps: 10}"],
            "no search would come before the last step",
        ),
        (
            [
                "objective={name: block, block_tokens: 4}",
                "curriculum={clip_search: {every_steps: 5}, block_sizes: [{block_tokens: 2, steps: 6}]}",
            ],
            "curriculum.clip_search.every_steps=5 with training.steps=10 and 6 steps of curriculum.block_sizes: no "
            "search would come",
        ),
        (
            ["objective={name: block, block_tokens: 4}", "curriculum.block_sizes=[{block_tokens: 1, steps: 10}]"],
            "would never be trained",
        ),
        (
            ["objective={name: d3pm, normalize_by: global_masked}"],
            "is not used by objective.name=d3pm, only by block, masked, sedd",
        ),
        (["objective={name: tauldr, normalize_by: global_masked}"], "is not used by objective.name=tauldr"),
        (["model.attention=flash"], "data.document_mask=true needs one; set model.attention=auto"),
        (
            ["model.attention=flash", "data.document_mask=false", "curriculum.annealing={pattern: window, steps: 9}"],
            "curriculum.annealing.pattern=window with data.document_mask=false needs one",
        ),
        (["objective.draws_per_sequence=3"], "training.micro_batch_size=2 is fewer than the 3 draws of a sequence"),
        (
            ["objective.name=genmd4", "training.micro_batch_size=1"],
            "training.micro_batch_size=1 is fewer than the 2 draws of a sequence",
        ),
        (
            ["optimizer={lr_schedule: constant, min_lr_ratio: 0.1}"],
            "optimizer.min_lr_ratio=0.1 is where the rate falls to",
        ),
        (["seed=4294967296"], "below 2**32"),
    ],
)
def test_a_contradiction_between_keys_is_reported_with_its_fix(recipe_file, overrides, message):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, overrides)
    assert message in str(error.value)


def test_a_stage_of_the_last_size_may_take_all_steps(recipe_file):
    stages = "curriculum.block_sizes=[{block_tokens: 1, steps: 4}, {block_tokens: 4, steps: 6}]"
    assert load_recipe(recipe_file, ["objective={name: block, block_tokens: 4}", stages]).contradictions() == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("+2.5e-3", 2.5e-3),
        (".5e-3", 5e-4),
        ("3", 3.0),
        ("1.", 1.0),
        ("0.1", 0.1),
        (" 2e-1 ", 0.2),
    ],
)
def test_a_number_is_read_as_people_write_it(recipe_file, text, value):
    assert load_recipe(recipe_file, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == value


def test_overrides_set_lists_nulls_and_negative_numbers(recipe_file):
    recipe = load_recipe(
        recipe_file, ["optimizer.betas=[0.9, 9.5e-1]", "objective.clip.beta=1e-1", "objective.clip.omega=0.5", "seed=0"]
    )
    assert recipe.optimizer.betas == (0.9, 0.95) and (recipe.objective.clip.beta, recipe.objective.clip.omega) == (
        0.1,
        0.5,
    )
    assert load_recipe(recipe_file, ["ema={decay: 0.5}", "ema="]).ema is None
    for negative in ("seed=-1", "optimizer.learning_rate=-1e-4", "training.steps=-3"):
        with pytest.raises(UserError, match="input should be greater than"):
            load_recipe(recipe_file, [negative])


def test_all_mistakes_are_reported_at_once(recipe_file):
    with pytest.raises(UserError, match="3 mistakes") as error:
        load_recipe(recipe_file, ["training.stps=1", "optimizer.learning_rate=-1", "objective.schedule.name=lin"])
    assert str(error.value).count("\n  - ") == 3
    with pytest.raises(UserError, match="2 mistakes"):
        load_recipe(recipe_file, ["model.architecture.width=33", "optimizer.warmup_steps=11"])


def test_text_that_is_not_yaml_or_repeats_a_key_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    for text, message in [
        ("a: [1", "not YAML"),
        ("name: a\nname: b", "'name' is repeated"),
        ("- 1", "a recipe is a mapping"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(str(path))
    with pytest.raises(UserError, match="near: quickstart"):
        load_recipe("quikstart")


def test_a_dumped_recipe_is_the_same_recipe(tmp_path):
    for name in shipped():
        recipe = load_recipe(name, [*GIVEN.get(name, ()), "optimizer.betas=[0.8, 0.9]"])
        (tmp_path / "again.yaml").write_text(dump(recipe))
        assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_the_hash_follows_the_result_and_nothing_else(recipe_file):
    plain = load_recipe(recipe_file)
    assert run_name(plain).startswith("test-") and len(recipe_hash(plain)) == 8
    same_run = (
        "parallelism.workers=2",
        "tracking.wandb=offline",
        "checkpoint.every_steps=7",
        "data.on_bad_sample=skip",
        "training.max_skipped_steps=3",
    )
    for same in same_run:
        assert recipe_hash(load_recipe(recipe_file, [same])) == recipe_hash(plain)
    for other in ("seed=1", "training.steps=11", "data.sources.0.path=x"):
        assert recipe_hash(load_recipe(recipe_file, [other])) != recipe_hash(plain)


def test_a_loaded_recipe_is_immutable(recipe_file):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file).training.steps = 3


def test_the_schema_has_every_key():
    text = json.dumps(Recipe.model_json_schema())
    assert all(f'"{key.rpartition(".")[2]}"' in text for key in all_keys(Recipe))


def test_every_key_of_the_schema_is_described():
    def undescribed(name, node):
        for key, field in node.get("properties", {}).items():
            if len(field.get("description", "").split()) < 1:
                yield f"{name}.{key}"

    schema = Recipe.model_json_schema()
    nodes = {"Recipe": schema} | schema["$defs"]
    ours = {
        name: node
        for name, node in nodes.items()
        if name not in ("Objective", "Sampling", "Schedule", "Simplex", "Clip")
    }
    assert [key for name, node in ours.items() for key in undescribed(name, node)] == []


def test_missing_keys_are_reported_together_and_say_what_belongs_there():
    with pytest.raises(UserError, match="adapt: 2 mistakes") as error:
        load_recipe("adapt")
    assert "model.base is missing" in str(error.value)
    assert "data.sources.0.path is missing: folder of shards that `dlm-ray data build` wrote" in str(error.value)


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 2000])
@pytest.mark.parametrize("block", [[], ["objective.name=block", "objective.block_tokens=16"]])
def test_the_adapt_recipe_is_valid_at_any_number_of_steps(steps, block):
    recipe = load_recipe("adapt", [*GIVEN["adapt"], f"training.steps={steps}", *block])
    assert 1 <= recipe.curriculum.annealing.num_steps(steps) <= steps
    assert recipe.optimizer.num_warmup_steps(steps) == steps // 20


@pytest.mark.parametrize(("share", "steps", "expected"), [(0.29, 100, 29), (0.0625, 240, 15), (0.3, 7, 2), (1.0, 7, 7)])
def test_a_share_of_the_run_is_rounded_down_to_whole_steps(share, steps, expected):
    assert steps_of_share(share, steps) == expected


def test_the_quickstart_keeps_the_lengths_that_its_published_numbers_were_measured_with():
    adapted, base = map(load_recipe, ("quickstart_own", "quickstart_base"))
    assert adapted.curriculum.annealing.num_steps(adapted.training.steps) == 72
    assert [one.optimizer.num_warmup_steps(one.training.steps) for one in (adapted, base)] == [15, 30]
