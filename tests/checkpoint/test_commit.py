"""A checkpoint is what was saved or it is refused: round trips, any number of ranks, and every kind of damage."""

import asyncio
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import torch
import torch.distributed as dist
from helpers.processes import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from dlm_ray.checkpoint import arrays, commit, listing, manifest
from dlm_ray.checkpoint.layout import block_of, check_tiling
from dlm_ray.checkpoint.model_files import fill_with_extra_row
from dlm_ray.config.errors import DamageError, UserError

FIELDS = {
    "step": 3,
    "recipe": {"name": "r"},
    "tokenizer": {},
    "model": {},
    "capabilities": {},
    "cursor": {"num_sequences": 7},
    "extra": {},
}


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
        "signed": torch.arange(-100, 100, dtype=torch.int8),
        "short": torch.arange(-100, 100, dtype=torch.int16),
        "int": torch.arange(5, dtype=torch.int32).reshape(5, 1),
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
    assert manifest.cursor == {"num_sequences": 7} and manifest.step == 3
    assert torch.equal(commit.read_tensor(saved, "model.b"), state()["model.b"])
    assert commit.verify(saved) == []


def test_a_server_whose_thread_runs_an_event_loop_can_read(saved):
    async def handler():
        return commit.read_tensor(saved, "counts")

    assert torch.equal(asyncio.run(handler()), state()["counts"])


def test_a_tensor_that_is_no_block_of_rows_in_memory_is_saved_and_filled_alike(tmp_path):
    strided = torch.arange(12.0).reshape(3, 4).T
    commit.save(str(tmp_path / "step"), {"a": strided}, FIELDS)
    target = torch.zeros(3, 4).T
    commit.load(str(tmp_path / "step"), {"a": target})
    assert torch.equal(target, strided)


def test_a_type_that_cannot_be_stored_is_named_and_nothing_is_committed(tmp_path):
    with pytest.raises(AssertionError, match=r"a is torch.complex64, and a checkpoint holds float32"):
        commit.save(str(tmp_path / "step"), {"a": torch.zeros(2, dtype=torch.complex64)}, FIELDS)
    assert not listing.is_committed(str(tmp_path / "step"))


def test_floating_types_are_converted_and_others_refused(saved):
    wide = torch.zeros(13)
    commit.load(saved, {"model.b": wide})
    assert torch.equal(wide, state()["model.b"].float())
    with pytest.raises(DamageError, match="counts is stored as int64"):
        commit.load(saved, {"counts": torch.zeros(9)})


def test_names_and_shapes_must_fit(saved):
    with pytest.raises(DamageError, match="has no model.c"):
        commit.load(saved, {"model.c": torch.zeros(1)})
    with pytest.raises(DamageError, match=r"model.a has shape \[101, 37\], but \[101, 38\]"):
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
    with pytest.raises(DamageError, match="format 99, and this version reads format 3"):
        commit.read_manifest(saved)
    rng = random.Random(0)
    for _ in range(20):
        content = bytearray(good)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(DamageError):
            commit.read_manifest(saved)
    path.write_bytes(good.replace(b"\n", b" ", 1))
    with pytest.raises(DamageError, match="its bytes differ"):
        commit.read_manifest(saved)


def without_digests(directory):
    path = Path(directory, "manifest.json")
    fields = {**json.loads(path.read_bytes()), "files": {}}
    path.write_bytes(manifest.serialize({**fields, "sha256": manifest.digest_of(fields)}))


def test_an_older_format_is_refused_with_what_to_do(saved):
    path = Path(saved, "manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "format": 2}))
    with pytest.raises(DamageError, match="format 2, and this version reads format 3; train the run again"):
        commit.load(saved, blank(state()))


def test_a_chunk_that_is_not_there_is_never_read_as_zeros(saved):
    """Tensorstore's defaults would leave chunks of zeros out, and read missing chunks as zeros.

    A loss could not be told from a value.
    """
    database = ts.KvStore.open(arrays.database(arrays.key_value_store(saved))).result()
    assert database.read("model.zeros/c/0/0").result().state == "value"
    database.write("model.zeros/c/0/0", None).result()
    without_digests(saved)  # otherwise the digests of the files would report it before any chunk is read
    with pytest.raises(DamageError, match=r"model\.zeros: damaged or incomplete"):
        commit.load(saved, blank(state()))
    [finding] = commit.verify(saved)
    assert "model.zeros" in finding


def test_what_a_failed_attempt_left_is_removed_and_a_checkpoint_is_not_overwritten(saved):
    with pytest.raises(UserError, match="already holds a checkpoint"):
        commit.save(saved, state(), FIELDS)
    Path(saved, "manifest.json").unlink()
    other = {"model.a": torch.ones(7, 7, dtype=torch.float64)}  # another shape and type under the same name
    commit.save(saved, other, FIELDS)
    assert torch.equal(commit.read_tensor(saved, "model.a"), other["model.a"])


def files_of(folder):
    """Relative path and content of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_copy_is_a_checkpoint_of_the_other_run(saved, tmp_path):
    target = str(tmp_path / "other/step_00000003")
    commit.copy(saved, target, {"name": "other"})
    manifest = commit.read_manifest(target)
    assert manifest.recipe == {"name": "other"} and manifest.extra == {"copied_from": saved}
    assert (manifest.step, manifest.cursor) == (3, {"num_sequences": 7}) and commit.verify(target) == []
    assert all(torch.equal(commit.read_tensor(target, name), tensor) for name, tensor in state().items())
    assert [path.name for path in Path(target).parent.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    ("already_there", "message"),
    [
        (["manifest.json"], "already holds a checkpoint"),
        (["thesis.tex"], "exists, and is not a checkpoint"),
        (["ocdbt.process_0/d/data"], "exists, and is not a checkpoint"),
    ],
)
def test_a_copy_deletes_nothing_that_lies_at_its_target(saved, tmp_path, already_there, message):
    target = tmp_path / "other"
    for name in already_there:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("mine")
    before = files_of(target)
    with pytest.raises(UserError, match=message):
        commit.copy(saved, str(target), {})
    assert files_of(target) == before
    with pytest.raises(UserError, match="already holds a checkpoint"):
        commit.copy(saved, saved, {})
    assert commit.verify(saved) == []


def test_a_copy_that_fails_leaves_no_target_and_one_that_was_killed_is_made_again(saved, tmp_path, monkeypatch):
    target, partial = tmp_path / "step_00000003", tmp_path / "step_00000003.partial"

    def full(*_):
        assert not target.exists()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DamageError, match="no space left"):
        patch.setattr(commit, "_commit", full)
        commit.copy(saved, str(target), {})
    assert not target.exists() and not partial.exists()
    (partial / "d").mkdir(parents=True)
    (partial / "d/half").write_bytes(b"half")
    assert listing.committed_steps(str(tmp_path)) == []
    commit.copy(saved, str(target), {})
    assert commit.verify(str(target)) == [] and not partial.exists() and not (target / "d/half").exists()
    (partial / "notes").mkdir(parents=True)
    target.rename(tmp_path / "away")
    with pytest.raises(UserError, match="holds notes, which no save writes"):
        commit.copy(saved, str(target), {})
    assert (partial / "notes").exists()


def test_what_no_save_wrote_is_neither_overwritten_nor_removed(three_steps):
    """A step's directory without a manifest is a save that was cut short only if nothing else lies in it."""
    [mine, file] = [Path(listing.step_directory(three_steps, step)) for step in (0, 4)]
    mine.mkdir()
    (mine / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="holds notes.md, which no save writes; nothing there is deleted"):
        commit.save(str(mine), state(), FIELDS)
    with pytest.raises(UserError, match="holds notes.md"):
        listing.remove(str(mine))
    assert listing.prune(three_steps, keep_last=2) == [1]
    assert (mine / "notes.md").read_text() == "mine"
    file.write_text("mine")
    commit.save(listing.step_directory(three_steps, 5), {"a": torch.ones(2)}, FIELDS)
    assert listing.prune(three_steps, keep_last=1) == [2, 3] and file.read_text() == "mine"


def test_blocks_must_tile_each_tensor_on_its_chunk_grid():
    shapes, chunks = {"w": (8, 4)}, {"w": (4, 4)}
    check_tiling(shapes, chunks, [{"w": ((0, 0), (4, 4))}, {"w": ((4, 0), (4, 4))}])
    for regions, message in [
        ([{"w": ((0, 0), (2, 4))}, {"w": ((2, 0), (6, 4))}], "chunk grid"),
        ([{"w": ((0, 0), (4, 4))}], "w: no rank wrote 1 of its 2 chunks"),
        ([{"w": ((0, 0), (8, 4))}, {"w": ((4, 0), (4, 4))}], "w: two ranks wrote the same 1 of its 2 chunks"),
        ([{"w": ((0, 0), (4, 4))}, {"w": ((0, 0), (4, 4))}], "no rank wrote"),
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


@pytest.mark.parametrize(
    ("offset", "shape", "chunk"),
    [
        ((0, 0), (4096, 4096), (256, 4096)),
        ((1000, 3), (5000, 777), (512, 128)),
        ((7,), (10**7,), (10**6,)),
        ((), (), ()),
        ((5, 0), (3, 9), (2, 4)),
    ],
)
def test_a_block_is_read_in_pieces_that_tile_it_on_the_borders_of_its_chunks(offset, shape, chunk):
    times_read = np.zeros(shape, dtype=np.int8)
    found = list(arrays.pieces(offset, shape, chunk, 4))
    for piece in found:
        times_read[piece] += 1
        for start, part, size, cut in zip(offset, piece, shape, chunk, strict=True):
            assert part.start == 0 or (start + part.start) % cut == 0
            assert part.stop == size or (start + part.stop) % cut == 0
        assert times_read[piece].size * 4 <= max(arrays.CHUNK_BYTES, 4 * np.prod(chunk, dtype=int))
    assert (times_read == 1).all()
    assert (
        len(found) <= 2 ** len(shape) + 4 * times_read.size * 4 / arrays.CHUNK_BYTES
    )  # small chunks are read together


def test_unaligned_writers_are_refused_because_merging_them_would_lose_rows(tmp_path):
    """What the check of the grid protects from.

    Two databases that each hold half of one chunk; the merge keeps one half, without a word.
    """
    base = arrays.key_value_store(str(tmp_path))
    for rank in (0, 1):
        spec = arrays.create_spec(
            arrays.database(arrays.below(base, f"ocdbt.process_{rank}"), "w"), [4, 2], [4, 2], torch.float32
        )
        arrays.wait(arrays.write_region(spec, torch.full((2, 2), rank + 1.0), (2 * rank, 0), arrays.context()))
    whole = block_of(torch.zeros(4, 2))
    commit._merge(str(tmp_path), base, 2, {"w": whole})
    merged = torch.zeros(4, 2)
    spec = arrays.open_spec(arrays.database(base, "w"))
    arrays.wait(arrays.read_region(spec, merged, (0, 0), torch.float32, [4, 2], arrays.Budget(), arrays.context()))
    assert sorted(set(merged[:, 0].tolist())) != [1.0, 2.0]
    with pytest.raises(AssertionError, match="chunk grid of 4"):
        check_tiling({"w": whole.shape}, {"w": whole.chunk}, [{"w": ((0, 0), (2, 2))}, {"w": ((2, 0), (2, 2))}])


@pytest.fixture
def three_steps(tmp_path):
    run = str(tmp_path / "run")
    for step in (1, 2, 3):
        commit.save(listing.step_directory(run, step), {"a": torch.ones(2)}, {**FIELDS, "step": step})
    return run


def test_pruning_keeps_the_last_steps_and_nothing_of_the_others(three_steps):
    assert listing.prune(three_steps, keep_last=2) == [1]
    assert listing.committed_steps(three_steps) == [2, 3] and listing.latest(three_steps).endswith("step_00000003")
    assert sorted(path.name for path in Path(three_steps).iterdir()) == ["step_00000002", "step_00000003"]
    assert listing.prune(three_steps, keep_last=5) == []


def test_pruning_keeps_the_best_and_every_so_many_steps_too(tmp_path):
    run = str(tmp_path / "run")
    nats = {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.1, 50: 2.6, 60: 2.7}
    for step, value in nats.items():
        metrics = {"validation": {"nats_per_token": value}, "validated_step": step}
        commit.save(
            listing.step_directory(run, step),
            {"a": torch.ones(2)},
            {**FIELDS, "step": step, "extra": {"metrics": metrics}},
        )
    # Committed at a stop, with the validation of the step before: no candidate, however good that was.
    metrics = {"validation": {"nats_per_token": 0.1}, "validated_step": 50}
    commit.save(
        listing.step_directory(run, 55), {"a": torch.ones(2)}, {**FIELDS, "step": 55, "extra": {"metrics": metrics}}
    )
    Path(listing.step_directory(run, 10), "manifest.json").write_text("damaged")
    assert listing.prune(run, keep_last=1, keep_best=2, keep_every_steps=30) == [10, 50, 55]
    assert listing.committed_steps(run) == [20, 30, 40, 60]


def test_a_bound_that_is_no_number_is_not_the_best_and_of_ties_the_first_is_kept(tmp_path):
    run = str(tmp_path / "run")
    nats = {10: 2.0, 20: float("nan"), 30: 2.0, 40: 1.0, 50: float("inf"), 60: float("-inf"), 70: 3.0}
    for step, value in nats.items():
        metrics = {"validation": {"nats_per_token": value}, "validated_step": step}
        commit.save(
            listing.step_directory(run, step),
            {"a": torch.ones(2)},
            {**FIELDS, "step": step, "extra": {"metrics": metrics}},
        )
    assert listing.prune(run, keep_last=1, keep_best=2) == [20, 30, 50, 60]
    assert listing.committed_steps(run) == [10, 40, 70]


def test_a_crash_while_pruning_leaves_a_step_that_is_not_believed_and_that_the_next_pruning_removes(
    three_steps, monkeypatch
):
    def crash(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", crash)
        listing.prune(three_steps, keep_last=2)
    first = Path(listing.step_directory(three_steps, 1))
    assert any(path.is_file() for path in first.rglob("*")) and listing.committed_steps(three_steps) == [2, 3]
    half_a_save = Path(
        listing.step_directory(three_steps, 4), "ocdbt.process_0/d/data"
    )  # a later step may be on its way: it stays
    half_a_save.parent.mkdir(parents=True)
    half_a_save.write_bytes(b"data")
    assert listing.prune(three_steps, keep_last=2) == [1]
    assert not first.exists() and half_a_save.exists()


def test_s3_holds_the_same_checkpoints(s3):
    directory = listing.step_directory(f"{s3}/run", 5)
    commit.save(directory, state(), FIELDS)
    loaded = blank(state())
    commit.load(directory, loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items())
    assert listing.latest(f"{s3}/run") == directory and listing.is_committed(directory)
    with pytest.raises(UserError, match="already holds a checkpoint"):
        commit.save(directory, state(), FIELDS)
    assert commit.verify(directory) == []
    commit.save(listing.step_directory(f"{s3}/run", 6), {"a": torch.ones(2)}, FIELDS)
    assert listing.prune(f"{s3}/run", 1) == [5] and listing.committed_steps(f"{s3}/run") == [6]


@pytest.mark.long
def test_a_missing_bucket_and_a_dead_endpoint_fail_within_seconds(s3, monkeypatch):
    with pytest.raises(UserError, match="storage does not answer"):
        commit.save("s3://nobody/run/step_00000001", {"a": torch.ones(2)}, FIELDS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="storage does not answer"):
        commit.save(f"{s3}/run/step_00000001", {"a": torch.ones(2)}, FIELDS)
    with pytest.raises(UserError, match="storage does not answer"):
        listing.latest(f"{s3}/run")
    with pytest.raises(UserError, match="storage does not answer"):
        listing.is_committed(f"{s3}/run/step_00000001")


def test_a_path_that_cannot_be_a_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="check the path") as failure:
        commit.save(str(tmp_path / "file/step_00000001"), {"a": torch.ones(2)}, FIELDS)
    assert not isinstance(failure.value, DamageError)


def test_a_full_disk_is_said_to_be_full():
    said = arrays.as_user_error(
        ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']"), "step: model.a"
    )
    assert (
        isinstance(said, DamageError)
        and "step: model.a: no space left" in str(said)
        and "the previous checkpoint is intact" in str(said)
    )


def two_linear_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Linear(13, 3))


def rank_saves_and_loads(rank, folder):
    """Two ranks save an unevenly sharded module, load what one rank saved, and agree on a failure."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    module = two_linear_layers()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(module, mesh=mesh)
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tensors["replicated"] = distribute_tensor(torch.arange(5.0), mesh, [Replicate()])
    tensors["empty"] = distribute_tensor(torch.zeros(0, 4), mesh, [Shard(0)])
    tensors["one row"] = distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)])  # nothing of it on rank 1
    tensors["columns"] = distribute_tensor(torch.arange(15.0).reshape(3, 5), mesh, [Shard(1)])
    tensors["plain"] = torch.tensor(7 + rank)  # rank 0's is the one that is kept
    commit.save(f"{folder}/two/step_00000001", tensors, FIELDS)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    commit.load(f"{folder}/one/step_00000001", tensors)
    for name, parameter in two_linear_layers().named_parameters():
        assert torch.equal(tensors[name].full_tensor(), parameter)
    assert torch.equal(tensors["columns"].full_tensor(), torch.arange(15.0).reshape(3, 5)) and tensors["plain"] == 7
    # The mask token's row does not depend on the number of ranks.
    extended, alone = distribute_tensor(torch.zeros(14, 7), mesh, [Shard(0)]), torch.zeros(14, 7)
    rows = two_linear_layers()[0].weight.detach()
    assert fill_with_extra_row(extended, rows, "w", seed=1) == fill_with_extra_row(alone, rows, "w", seed=1)
    assert torch.equal(extended.full_tensor(), alone) and torch.equal(alone[:13], rows)
    with pytest.raises(AssertionError, match="partial sum"):
        block_of(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    # Only rank 0 sees the refusal by itself; both must raise it.
    with pytest.raises(UserError, match="already holds a checkpoint"):
        commit.save(f"{folder}/two/step_00000001", tensors, FIELDS)
    dist.barrier()  # a rank that leaves first would reset the other's connection
    dist.destroy_process_group()


@pytest.mark.long
def test_two_ranks_save_what_one_loads_and_the_other_way_round(tmp_path):
    expected = {name: parameter.detach() for name, parameter in two_linear_layers().named_parameters()}
    expected |= {"replicated": torch.arange(5.0), "empty": torch.zeros(0, 4), "one row": torch.ones(1, 4)}
    expected |= {"columns": torch.arange(15.0).reshape(3, 5), "plain": torch.tensor(7)}
    commit.save(str(tmp_path / "one/step_00000001"), expected, FIELDS)
    assert run_ranks(rank_saves_and_loads, 2, str(tmp_path)) == [0, 0]
    loaded = blank(expected)
    commit.load(str(tmp_path / "two/step_00000001"), loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert commit.verify(str(tmp_path / "two/step_00000001")) == []
