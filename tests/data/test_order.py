"""The order is a pure function: exact, seekable, weighted, and small at scale."""

import resource
import time
from dataclasses import astuple

import numpy as np
import pytest

from dlm_ray.data.identity import TokenizerIdentity
from dlm_ray.data.index import FORMAT, Index, Shard, Split
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import rank_batches


def index(*shard_rows):
    shards = tuple(
        Shard(file=f"{i}.tar", part=i, sequences=rows, sha256="", size_bytes=0) for i, rows in enumerate(shard_rows)
    )
    split = Split(sequences=sum(shard_rows), tokens=0, bytes=0, documents=0, shards=shards)
    return Index(
        format=FORMAT,
        sequence_length=8,
        tokenizer=TokenizerIdentity("t", "s", 10, 0, 0),
        splits={"train": split},
        built_from={},
    )


def take(order, num_rows, cursor=None):
    return order.references(cursor or Cursor.start(len(order.indexes)), num_rows)


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    order = Order([index(5, 9, 1, 7)], [1.0], seed=3, window_shards=2)
    first, cursor = take(order, 22)
    second, _ = take(order, 22, cursor)
    everything = {(shard, row) for shard, rows in enumerate((5, 9, 1, 7)) for row in range(rows)}
    assert {(one.shard, one.sequence) for one in first} == everything == {(one.shard, one.sequence) for one in second}
    assert first != second


@pytest.mark.parametrize("cut", [1, 10, 21, 22, 23, 60])
def test_a_cursor_goes_on_exactly_where_it_was_taken(cut):
    order = Order([index(5, 9, 1, 7), index(4, 4)], [2.0, 1.0], seed=3, window_shards=2)
    whole, end = take(order, 80)
    before, cursor = take(order, cut)
    fresh = Order([index(5, 9, 1, 7), index(4, 4)], [2.0, 1.0], seed=3, window_shards=2)
    after, also_end = take(fresh, 80 - cut, Cursor.from_dict(cursor.as_dict()))
    assert before + after == whole and end == also_end


def test_weights_hold_within_one_row_at_every_prefix():
    order = Order([index(50), index(50), index(50)], [0.6, 0.3, 0.1], seed=0, window_shards=1)
    counts = [0, 0, 0]
    for taken, reference in enumerate(take(order, 500)[0], start=1):
        counts[reference.source] += 1
        assert all(abs(count - weight * taken) <= 1 for count, weight in zip(counts, (0.6, 0.3, 0.1), strict=True))


def test_rows_are_mixed_within_a_window_and_no_further():
    order = Order([index(*[10] * 8)], [1.0], seed=1, window_shards=2)
    references, _ = take(order, 80)
    for window in range(4):
        assert len({one.shard for one in references[window * 20 : window * 20 + 20]}) == 2
    assert [one.sequence for one in references[:10]] != sorted(one.sequence for one in references[:10])


def test_the_order_follows_the_seed():
    one, two = (take(Order([index(30)], [1.0], seed, 1), 30)[0] for seed in (0, 1))
    assert one != two


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_take_the_same_global_batches(world_size):
    order = Order([index(5, 9, 1, 7)], [1.0], seed=3, window_shards=2)
    expected, _ = take(order, 4 * 7)
    taken = []
    for rank in range(world_size):
        groups = rank_batches(
            order, Cursor.start(1), global_batch_size=7, rank=rank, world_size=world_size, num_steps=4
        )
        taken.append([step for steps, _ in groups for step in steps])
    for step in range(4):
        together = [one for rank in range(world_size) for one in taken[rank][step]]
        assert together == expected[step * 7 : step * 7 + 7]
        assert max(len(rank[step]) for rank in taken) - min(len(rank[step]) for rank in taken) <= 1


@pytest.mark.long
def test_seeking_in_thirty_million_sequences_takes_two_seconds_and_little_memory():
    big = index(*[3000] * 10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    order = Order([big], [1.0], seed=0, window_shards=8)
    references, _ = order.references(Cursor(23_456_789, (23_456_789,)), 4096)
    places, end = order.places(Cursor(23_456_789, (23_456_789,)), 2_000_000)
    elapsed = time.process_time() - started
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(set(references)) == 4096 and [tuple(place) for place in places[:4096]] == [
        astuple(one) for one in references
    ]
    assert end.counts == (25_456_789,) and len(np.unique(places[:, 1] * 3000 + places[:, 2])) == 2_000_000
    assert elapsed < 2 and grown_mib < 300


def test_one_at_a_time_and_many_at_once_are_the_same_order():
    order = Order([index(5, 9, 1, 7), index(4, 4), index(3)], [2.0, 1.0, 0.5], seed=3, window_shards=2)
    whole, _ = take(order, 200)
    cursor, singly = Cursor.start(3), []
    for _ in range(200):
        [one], cursor = take(order, 1, cursor)
        singly.append(one)
    assert singly == whole
