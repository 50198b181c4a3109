"""What is typed as a URL is one.

It works, or it is refused with what is allowed; no local folder ever gets its name.
"""

import asyncio
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers.recipes import tiny_recipe

import dlm_ray
from dlm_ray.checkpoint import commit, weights
from dlm_ray.checkpoint.export import export
from dlm_ray.cli.main import main
from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import is_url
from dlm_ray.config.server import Server
from dlm_ray.data import storage
from dlm_ray.data.index import load_index
from dlm_ray.serving.pinning import pinned
from dlm_ray.serving.worker import EngineWorker
from dlm_ray.training import loop, setup

pytestmark = pytest.mark.long

LOCAL = "is read and written on a local disk only, not at a URL; give a local"
ELSEWHERE = "allowed are a local folder, s3://BUCKET/... and gs://BUCKET/..."


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://a/b", True), ("S3://a", True), ("s3:/a/b", True), ("gs://a", True), ("hdfs://h:1/a", True),
        ("file:///a", True), ("a/b", False),
     ("/a/b:/c", False), ("a:b", False), ("c:/x", False), ("org/name", False), (Path("s3://a/b"), True)],
)  # fmt: skip
def test_a_url_is_known_with_one_slash_or_two(path, expected):
    assert is_url(path) == expected


def run(monkeypatch, capfd, *arguments):
    """(exit code, message) of a command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["dlm-ray", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    return raised.value.code, " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quickstart_base", "--out", "s3://b/runs"], f"--out s3://b/runs: this {LOCAL} folder"),
        (["train", "quickstart_base", "--out", "s3:/b/runs"], f"--out s3://b/runs: this {LOCAL} folder"),
        (["train", "s3://b/recipe.yaml"], f"the recipe s3://b/recipe.yaml: this {LOCAL} file"),
        (["sweep", "sweeps/laptop/block_size", "--out", "gs://b/sweep"], f"--out gs://b/sweep: this {LOCAL} folder"),
        (["sweep", "s3://b/sweep.yaml"], f"the sweep s3://b/sweep.yaml: this {LOCAL} file"),
        (["sweep", "clip-search", "run", "--data", "d", "--out", "s3://b/clips"], 
            f"--out s3://b/clips: this {LOCAL} folder"),
        (["quickstart", "--smoke", "--out", "s3://b/quick"], f"--out s3://b/quick: this {LOCAL} folder"),
        (["export", "run", "s3://b/model"], f"FOLDER s3://b/model: this {LOCAL} folder"),
        (["export", "hdfs://b/run", "model"], ELSEWHERE),
        (["serve", "s3://b/serve.yaml"], f"the service's file s3://b/serve.yaml: this {LOCAL} file"),
        (["data", "build", "s3://b/texts", "--out", "d", "--train-tokenizer", "300"],
            "SOURCE s3://b/texts: this is read and written on a local"),
        (["data", "build", "texts", "--out", "s3:/b/d", "--train-tokenizer", "300"], f"--out s3:/b/d: {ELSEWHERE}"),
        (["data", "build", "texts", "--out", "hdfs://b/d", "--train-tokenizer", "300"],
            f"--out hdfs://b/d: {ELSEWHERE}"),
        (["data", "inspect", "hdfs://b/d"], "hdfs:// is not supported; use a local path, s3:// or gs://"),
        (["sample", "s3:/b/run"], ELSEWHERE),
        (["eval", "file:///b/run", "--data", "d"], ELSEWHERE),
        (["checkpoint", "list", "s3:/b/run"], ELSEWHERE),
        (["checkpoint", "verify", "hdfs://b/run"], ELSEWHERE),
        (["checkpoint", "prune", "s3:/b/run"], ELSEWHERE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_verbs_refuse_the_urls_that_they_have_no_use_for(arguments, message, monkeypatch, capfd, tmp_path):
    (tmp_path / "texts").write_text("a text")
    monkeypatch.chdir(tmp_path)
    code, said = run(monkeypatch, capfd, *arguments)
    assert code == 2 and message in said
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("dlm_ray.training", ["quickstart_base", "--out", "s3://b/runs"]),
        ("dlm_ray.evaluation.studies.objectives", ["--out", "s3://b/study"]),
        ("dlm_ray.evaluation.studies.block_size", ["--out", "study", "--results", "gs://b/study"]),
        ("dlm_ray.evaluation.studies.annealing", ["--out", "study", "--quickstart", "s3://b/quick"]),
        ("dlm_ray.evaluation.studies.draws", ["--runs", "s3://b/study"]),
        ("dlm_ray.evaluation.speed", ["sample", "--shape", "quickstart", "--out", "s3://b/speed"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_modules_refuse_urls(module, arguments, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as raised:
        runpy.run_module(module, run_name="__main__")
    assert raised.value.code == 2 and f"{arguments[-1]}: this {LOCAL} folder" in " ".join(
        capfd.readouterr().err.split()
    )
    assert not list(tmp_path.iterdir())


def test_functions_refuse_urls_also_those_that_have_been_paths(data_folder, monkeypatch, tmp_path):
    from dlm_ray.runtime.train import fit

    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(data_folder)
    for out in ("s3://bucket/runs", Path("s3://bucket/runs")):
        for call in (
            lambda out=out: fit(recipe, out),
            lambda out=out: loop.fit(recipe, out),
            lambda out=out: export("run", str(out)),
        ):
            with pytest.raises(UserError, match="s3://bucket/runs: this is read and written on a local disk only"):
                call()
    with pytest.raises(UserError, match="allowed are a local folder, s3://BUCKET"):
        storage.write("s3:/bucket/file", b"")
    with pytest.raises(UserError, match="allowed are a local folder, s3://BUCKET"):
        commit.save("s3:/bucket/step_00000001", {"model.a": torch.ones(2)}, {})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def remote(data_folder, s3, tmp_path_factory):
    """(the same run on the disk, in a bucket)."""
    run_dir = tmp_path_factory.mktemp("remote") / "run"
    loop.fit(tiny_recipe(data_folder, "remote", training__steps=4, sampling__top_p=0.9), run_dir)
    for path in run_dir.rglob("*"):
        if path.is_file():
            storage.write(f"{s3}/remote/{path.relative_to(run_dir)}", path.read_bytes())
    return str(run_dir), f"{s3}/remote"


def test_a_checkpoint_in_a_bucket_is_sampled_scored_and_served_as_on_the_disk(remote, data_folder):
    here, there = (dlm_ray.load(path) for path in remote)
    options = {"length_tokens": 8, "steps": 4, "seed": 1}
    expected = here.sample("the model", **options)
    assert there.sample("the model", **options) == expected
    assert there.sampling_target() == here.sampling_target() and there.tokenizer_identity == here.tokenizer_identity
    assert (
        there.score(data_folder, draws_per_sequence=2).bits_per_byte
        == here.score(data_folder, draws_per_sequence=2).bits_per_byte
    )

    server = pinned(Server(checkpoint=remote[1], name="own"))
    assert server.checkpoint == weights.our_checkpoint(remote[1])
    host = EngineWorker(server)
    try:
        scored = [asyncio.run(host.score("the model", 4, 0))["nats"] for host in (host, host)]
        assert scored[0] == scored[1] and host.describe()["defaults"]["top_p"] == 0.9
    finally:
        host.close()


def test_a_checkpoint_in_a_bucket_is_a_base_and_is_exported(remote, data_folder, tmp_path):
    changes = {"model__architecture": None, "model__base": remote[1]}
    network = setup.resolve(tiny_recipe(data_folder, **changes), False, load_index(data_folder).tokenizer)
    assert network.base_has_mask_row
    loop.fit(tiny_recipe(data_folder, **changes, training__steps=2, validation__sequences=0), tmp_path / "next")
    exported = [export(path, str(tmp_path / name)) for name, path in zip(("here", "there"), remote, strict=True)]
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (exported[0] / name).read_bytes() == (exported[1] / name).read_bytes()


def test_a_bucket_without_a_checkpoint_says_so(remote, s3):
    with pytest.raises(
        UserError,
        match="s3://bucket/nothing is not a dlm_ray checkpoint: .* A Hugging Face folder must be on a local disk",
    ):
        dlm_ray.load(f"{s3}/nothing")


def test_steps_in_a_bucket_are_listed_verified_and_pruned(remote, s3, monkeypatch, capfd, tmp_path):
    """Also those that were written on a disk and copied."""
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, capfd, "checkpoint", "verify", remote[1])[0] == 0
    step = f"{s3}/remote/step_00000004"
    for path in Path(remote[0], "step_00000004").rglob("*"):
        if path.is_file():
            storage.write(
                f"{s3}/damaged/step_00000004/{path.relative_to(remote[0] + '/step_00000004')}", path.read_bytes()
            )
    largest = max(Path(remote[0], "step_00000004/ocdbt.process_0/d").iterdir(), key=lambda path: path.stat().st_size)
    storage.write(f"{s3}/damaged/step_00000004/ocdbt.process_0/d/{largest.name}", bytes(largest.stat().st_size))
    code, said = run(monkeypatch, capfd, "checkpoint", "verify", f"{s3}/damaged")
    assert code == 1 and "model." in said
    assert run(monkeypatch, capfd, "checkpoint", "prune", remote[1], "--keep-last", "1")[0] == 0
    assert weights.our_checkpoint(remote[1]) == step
    assert not list(tmp_path.iterdir())
