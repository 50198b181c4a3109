"""The shipped recipes: free of mistakes, named as their files, and with the numbers of their papers."""

import json
import re
import zipfile

import pytest

from dlm_ray.config.load import load_recipe, shipped
from dlm_ray.data.tokenizer import encode, identity, load_tokenizer

SHIPPED = shipped()
PAPERS = sorted(name for name in SHIPPED if name.startswith("recipes/"))
FULL = [name for name in PAPERS if not name.endswith("_tiny")]
TINY = [name for name in PAPERS if name.endswith("_tiny")]
README = SHIPPED[PAPERS[0]].parent.joinpath("README.md").read_text()


def head_comment(name):
    lines = SHIPPED[name].read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_recipe_loads_without_contradictions(name):
    given = ["model.base=gpt2", "data.sources.0.path=data/mine"] if name == "adapt" else []
    assert load_recipe(name, given).contradictions() == []


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_has_the_name_of_its_file(name):
    assert f"recipes/{load_recipe(name).name}" == name


def test_every_recipe_has_a_tiny_variant():
    assert {f"{name}_tiny" for name in FULL} == set(TINY) and len(FULL) == 32


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_variant_has_the_objective_and_the_kind_of_optimizer_of_its_recipe(name):
    tiny, full = load_recipe(name), load_recipe(name.removesuffix("_tiny"))
    assert tiny.objective == full.objective
    assert (tiny.sampling.rule, tiny.sampling.grid) == (full.sampling.rule, full.sampling.grid)
    for key in ("lr_schedule", "betas", "weight_decay", "max_grad_norm"):
        assert getattr(tiny.optimizer, key) == getattr(full.optimizer, key), key
    assert tiny.curriculum.annealing.pattern == full.curriculum.annealing.pattern
    sizes = [[stage.block_tokens for stage in recipe.curriculum.block_sizes] for recipe in (tiny, full)]
    assert sizes[0] == sizes[1] and (tiny.curriculum.clip_search is None) == (full.curriculum.clip_search is None)
    assert (tiny.ema is None) == (full.ema is None)
    assert (tiny.model.base is None) == (full.model.base is None)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_network_has_at_most_3_million_parameters(name):
    network = load_recipe(name).model.architecture
    if network is None:  # from the base that the tiny AR recipe makes
        network = load_recipe("recipes/ar_owt_small_tiny").model.architecture
    intermediate = network.intermediate or -(-8 * network.width // 3 // 64) * 64
    block = 4 * network.width**2 + 3 * network.width * intermediate + 2 * network.width
    embeddings = (1 if network.tie_embeddings else 2) * 4096 * network.width
    if "ssd_lm" in name:
        embeddings += 4096 * network.width  # W_diff
    assert network.num_layers * block + network.width + embeddings <= 3_000_000


@pytest.mark.parametrize("name", FULL)
def test_a_full_recipe_says_which_paper_and_what_differs(name):
    head = head_comment(name)
    assert re.search(r"arXiv \d{4}\.\d{5}\b", head) and "differs" in head
    assert "dlm-ray data build" in head


@pytest.mark.parametrize("name", FULL)
def test_positions_are_shifted_where_the_paper_shifts_them(name):
    recipe = load_recipe(name)
    starts_from_ar = recipe.model.base is not None and "mdlm" not in recipe.model.base
    assert recipe.objective.shift == (starts_from_ar or recipe.objective.name == "autoregressive")


@pytest.mark.parametrize("name", FULL)
def test_the_readme_lists_every_recipe(name):
    assert f"| `{name.removeprefix('recipes/')}` |" in README


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("md4_text8", "optimizer.weight_decay", 0.03),
        ("md4_text8", "objective.schedule.epsilon_0", 0.0001),
        ("md4_owt_medium", "model.architecture.num_layers", 24),
        ("genmd4_owt_small", "optimizer.warmup_steps", 2000),
        ("sedd_owt_small", "training.steps", 400_000),
        ("sedd_lm1b", "objective.schedule.epsilon_1", 0.001),
        ("d3pm_text8", "objective.num_timesteps", 1000),
        ("tauldr_text8", "objective.estimator", "one_token"),
        ("ssd_lm_owt", "training.global_batch_size", 6144),
        ("ssd_lm_owt", "objective.simplex.num_timesteps", 5000),
        ("ssd_lm_owt", "optimizer.decay_steps", 98_000),
        ("mdlm_lm1b", "model.architecture.max_positions", 128),
        ("ar_owt_small", "ema.decay", 0.9999),
        ("bd3_lm1b_4", "objective.clip.beta", 0.45),
        ("bd3_lm1b_16", "objective.clip.omega", 0.8),
        ("bd3_owt_4", "training.steps", 150_000),
        ("bd3_owt_8", "curriculum.clip_search.every_steps", 5000),
        ("bd3_owt_1", "objective.mask_sampler", "count"),
        ("diffugpt_small", "curriculum.annealing.steps", 10_000),
        ("diffugpt_medium", "training.global_batch_size", 1280),
        ("diffullama_7b", "optimizer.learning_rate", 0.00002),
        ("diffullama_7b", "optimizer.betas", (0.9, 0.95)),
    ],
)
def test_hyper_parameters_are_the_papers(name, key, value):
    node = load_recipe(f"recipes/{name}")
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value


def test_the_readmes_tokenizer_of_text8_has_a_token_a_character(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    text = " anarchism originated as a term of abuse" * 1000
    with zipfile.ZipFile("data/text8.zip", "w") as archive:
        archive.writestr("text8", text)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    exec(compile(code, "configs/recipes/README.md", "exec"), {})

    tokenizer = load_tokenizer("data/text8-tokenizer")
    assert identity(tokenizer).vocab_size == 28  # and the mask token
    documents = [json.loads(line)["text"] for line in (tmp_path / "data/text8-train.jsonl").read_text().splitlines()]
    assert "".join(documents) == text
    [(ids, num_bytes), *_] = encode(tokenizer, documents)
    assert len(ids) == 25_499 and set(num_bytes) == {1}
    assert tokenizer.decode(ids[:30]) == text[:30]
