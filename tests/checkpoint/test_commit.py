"""A checkpoint is what was saved or it is refused: round trips, any number of ranks, and every kind of damage."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dlm_ray.checkpoint import arrays, commit, listing
from dlm_ray.checkpoint.layout import check_tiling
from dlm_ray.config.errors import DamageError, UserError

FIELDS = {"step": 3, "recipe": {"name": "r"}, "tokenizer": {}, "model": {}, "capabilities": {}, "cursor": {"rows": 7}, "extra": {}}


def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(101, 37, generator=generator),
        "model.b": torch.randn(13, generator=generator).to(torch.bfloat16),
        "model.zeros": torch.zeros(64, 8),
        "model.half": torch.randn(5, 3, 2, generator=generator).half(),
        "optimizer.step": torch.tensor(17.0),
        "counts": torch.arange(9),
        "bytes": torch.arange(200, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }


def blank(tensors):
    return {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}


@pytest.fixture
def saved(tmp_path):
    directory = listing.step_directory(str(tmp_path / "run"), 3)
    commit.save(directory, state(), FIELDS)
    return directory


def test_every_dtype_and_shape_comes_back_bit_for_bit(saved):
    loaded = blank(state())
    manifest = commit.load(saved, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items())
    assert manifest.cursor == {"rows": 7} and manifest.step == 3
    assert torch.equal(commit.read_tensor(saved, "model.b"), state()["model.b"])
    assert commit.verify(saved) == []


def test_floating_types_are_converted_and_others_refused(saved):
    wide = torch.zeros(13)
    commit.load(saved, {"model.b": wide})
    assert torch.equal(wide, state()["model.b"].float())
    with pytest.raises(DamageError, match="counts is stored as int64"):
        commit.load(saved, {"counts": torch.zeros(9)})


def test_names_and_shapes_must_fit(saved):
    with pytest.raises(DamageError, match="has no model.c"):
        commit.load(saved, {"model.c": torch.zeros(1)})
    with pytest.raises(DamageError, match=r"model.a has shape \[101, 37\], and \[101, 38\]"):
        commit.load(saved, {"model.a": torch.zeros(101, 38)})


def test_no_manifest_no_checkpoint(saved):
    Path(saved, "manifest.json").unlink()
    with pytest.raises(DamageError, match="is not a checkpoint: it has no manifest.json"):
        commit.load(saved, blank(state()))
    assert listing.latest(str(Path(saved).parent)) is None


def test_a_newer_format_and_a_flip_in_the_manifest_are_refused(saved):
    path = Path(saved, "manifest.json")
    good = path.read_bytes()
    fields = json.loads(good)
    path.write_text(json.dumps({**fields, "format": 99}))
    with pytest.raises(DamageError, match="format 99, and this version reads up to 1"):
        commit.read_manifest(saved)
    rng = random.Random(0)
    for _ in range(20):
        content = bytearray(good)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(7)
        if json_equal(content, good):
            continue  # white space
        path.write_bytes(content)
        with pytest.raises(DamageError):
            commit.read_manifest(saved)


def json_equal(one, two):
    try:
        return json.loads(one) == json.loads(two)
    except ValueError:
        return False


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
def test_damage_anywhere_is_found_by_verify_and_by_loading(saved, tmp_path, kind):
    """Every file of a checkpoint that a reader needs; what a reader does not need may be damaged without harm, and then loads right."""
    rng = random.Random(kind)
    files = sorted(path.relative_to(saved) for path in Path(saved).rglob("*") if path.is_file() and path.name != "manifest.json")
    found = 0
    for trial in range(14):
        copy = tmp_path / f"copy{trial}"
        shutil.copytree(saved, copy)
        victim = copy / files[trial % len(files)]
        content = bytearray(victim.read_bytes())
        if kind == "delete":
            victim.unlink()
        elif kind == "truncate":
            victim.write_bytes(content[: rng.randrange(len(content))])
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            victim.write_bytes(content)
        loaded = blank(state())
        try:
            commit.load(str(copy), loaded)
        except DamageError as error:
            found += 1
            assert str(copy) in str(error) and any(name in str(error) for name in state())
            assert commit.verify(str(copy))
        else:
            assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items()), f"{victim}: silently wrong"
            assert commit.verify(str(copy)) == []
    assert found >= 5


def test_zeros_are_stored_so_that_their_loss_is_noticed(saved):
    """By default all-zero chunks are left out, and a chunk that is missing reads as zeros."""
    import tensorstore as ts

    keys = ts.KvStore.open(arrays.database(arrays.key_value_store(saved))).result().list().result()
    assert any(key.startswith(b"model.zeros/c/") for key in keys)


def test_what_a_failed_attempt_left_is_removed_and_a_checkpoint_is_not_overwritten(saved):
    with pytest.raises(UserError, match="holds a checkpoint already"):
        commit.save(saved, state(), FIELDS)
    Path(saved, "manifest.json").unlink()
    other = {"model.a": torch.ones(7, 7, dtype=torch.float64)}  # another shape and type under the same name
    commit.save(saved, other, FIELDS)
    assert torch.equal(commit.read_tensor(saved, "model.a"), other["model.a"])


def test_blocks_must_tile_each_tensor_on_its_chunk_grid():
    shapes, chunks = {"w": (8, 4)}, {"w": (4, 4)}
    check_tiling(shapes, chunks, [{"w": ((0, 0), (4, 4))}, {"w": ((4, 0), (4, 4))}])
    for regions, message in [
        ([{"w": ((0, 0), (2, 4))}, {"w": ((2, 0), (6, 4))}], "chunk grid"),
        ([{"w": ((0, 0), (4, 4))}], "16 elements of 32"),
        ([{"w": ((0, 0), (4, 4))}, {"w": ((0, 0), (4, 4))}], "same elements"),
    ]:
        with pytest.raises(AssertionError, match=message):
            check_tiling(shapes, chunks, regions)


@pytest.mark.parametrize("shape", [(16001, 512), (4096, 4096), (4001, 11), (7,), (), (1, 0)])
def test_chunks_divide_the_block_and_are_a_few_megabytes(shape):
    chunk = arrays.chunk_shape(shape, 4)
    volume = 4
    for size, part in zip(shape, chunk, strict=True):
        assert part >= 1 and max(1, size) % part == 0
        volume *= part
    assert volume <= arrays.CHUNK_BYTES


def test_pruning_removes_the_manifest_first(tmp_path, monkeypatch):
    run = str(tmp_path)
    for step in (1, 2, 3):
        commit.save(listing.step_directory(run, step), {"a": torch.ones(2)}, {**FIELDS, "step": step})
    assert listing.prune(run, keep_last=2) == [1]
    assert listing.committed_steps(run) == [2, 3]
    assert not list(Path(run, "step_00000001").rglob("*.*"))
    assert listing.latest(run).endswith("step_00000003")


def test_s3_holds_the_same_checkpoints(s3):
    directory = listing.step_directory(f"{s3}/run", 5)
    commit.save(directory, state(), FIELDS)
    loaded = blank(state())
    commit.load(directory, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items())
    assert listing.latest(f"{s3}/run") == directory and listing.is_committed(directory)
    commit.save(listing.step_directory(f"{s3}/run", 6), {"a": torch.ones(2)}, FIELDS)
    assert listing.prune(f"{s3}/run", 1) == [5] and listing.committed_steps(f"{s3}/run") == [6]


def test_a_missing_bucket_and_a_dead_endpoint_fail_within_seconds(s3, monkeypatch):
    with pytest.raises(UserError, match="storage does not answer"):
        commit.save("s3://nobody/run/step_00000001", {"a": torch.ones(2)}, FIELDS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="storage does not answer"):
        commit.save(f"{s3}/run/step_00000001", {"a": torch.ones(2)}, FIELDS)


def two_linear_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Linear(13, 3))


def rank_saves_and_loads(rank, folder):
    """Two ranks save an unevenly sharded module, load what one rank saved, and agree on a failure."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    module = two_linear_layers()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    commit.save(f"{folder}/two/step_00000001", tensors, FIELDS)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    commit.load(f"{folder}/one/step_00000001", tensors)
    for name, parameter in two_linear_layers().named_parameters():
        assert torch.equal(tensors[name].full_tensor(), parameter)
    # Only rank 0 sees the refusal by itself; both must raise it.
    with pytest.raises(UserError, match="holds a checkpoint already"):
        commit.save(f"{folder}/two/step_00000001", tensors, FIELDS)
    dist.destroy_process_group()


def test_two_ranks_save_what_one_loads_and_the_other_way_round(tmp_path):
    expected = {name: parameter.detach() for name, parameter in two_linear_layers().named_parameters()}
    commit.save(str(tmp_path / "one/step_00000001"), expected, FIELDS)
    torch.multiprocessing.spawn(rank_saves_and_loads, args=(str(tmp_path),), nprocs=2)
    loaded = blank(expected)
    commit.load(str(tmp_path / "two/step_00000001"), loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert commit.verify(str(tmp_path / "two/step_00000001")) == []
