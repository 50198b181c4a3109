"""A network whose parameters are sharded over several processes: one leader, and followers that repeat its calls.

Every call gathers the same parameters in the same order in all processes. Only the leader has requests, the cache and
random numbers, and its texts equal those of one device, bit for bit. A follower runs each call with a dummy input and
ignores the result. So the processes share the memory of the parameters and not the work: use this for networks that do
not fit on one device. It is slower than one device that the network fits on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dlm_ray.diffusion.denoiser import Cache, PassKeyValues, ReductionT
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models.denoiser import HuggingFaceDenoiser

# A collective of the network fails after the first; a follower waits for the leader's next call up to the second.
_COLLECTIVE_TIMEOUT = timedelta(seconds=120)
_IDLE_TIMEOUT = timedelta(days=365)
T = TypeVar("T")


class Call(IntEnum):
    """The leader's next call."""

    STOP = 0
    HIDDEN = 1
    LOGITS = 2


@dataclass(frozen=True)
class Group:
    """The processes that share a network, as seen by one of them."""

    mesh: DeviceMesh
    """The mesh over which the parameters are sharded."""
    calls: dist.ProcessGroup
    """The gloo group for announcements of calls, through host memory."""

    def send(self, call: Call) -> None:
        """Announce a call from rank 0 to all other ranks."""
        dist.broadcast(torch.tensor(int(call)), src=0, group=self.calls)

    def receive(self) -> Call:
        """Wait for the next call of rank 0 and return it."""
        call = torch.empty((), dtype=torch.int64)
        dist.broadcast(call, src=0, group=self.calls)
        return Call(int(call))


def create_store() -> TCPStore:
    """Return a rendezvous store on a free port of this machine; rank 0 keeps it as long as the group exists."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_COLLECTIVE_TIMEOUT)


def join(rank: int, num_shards: int, store: TCPStore | int, device: torch.device) -> Group:
    """Collective: join this process to a group, all of whose processes are on one machine.

    Args:
        rank: the rank; 0 is the leader.
        num_shards: the number of processes.
        store: the store of `create_store` on rank 0; its port on other ranks.
        device: the device of this process's shard.
    """
    if isinstance(store, int):
        store = TCPStore("127.0.0.1", store, is_master=False, timeout=_COLLECTIVE_TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_shards, timeout=_COLLECTIVE_TIMEOUT)
    return Group(init_device_mesh(device.type, (num_shards,)), dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT))


def leave() -> None:
    """Close this process's connections, so that the other processes fail at once instead of waiting."""
    dist.destroy_process_group()


class LeaderDenoiser(HuggingFaceDenoiser):
    """The denoiser of rank 0: it announces every call of `hidden` or `reduce_logits` to the followers, then runs it.

    Use it from one thread at a time. Its constructor is collective: it returns when all processes have loaded.

    Args:
        group: the processes that share the network.
        denoiser: the denoiser of this process, whose parameters are sharded over the group.
    """

    def __init__(self, group: Group, denoiser: HuggingFaceDenoiser):
        nn.Module.__init__(self)  # the network exists already
        self.network, self.mask_id, self.shift = denoiser.network, denoiser.mask_id, denoiser.shift
        self.attention_kernel = denoiser.attention_kernel
        self.is_lost = False
        """Whether a call has failed: the ranks may then be at different calls, which cannot be repaired."""
        self._group, self._sharded = group, denoiser
        self.eval()
        dist.barrier(group.calls)

    def hidden(self, inputs: Tensor, visibility: Visibility, kv: Cache | PassKeyValues | None = None) -> Tensor:
        """Return the hidden states of `HuggingFaceDenoiser.hidden`, computed with the followers."""
        return self._run_with_followers(Call.HIDDEN, lambda: self._sharded.hidden(inputs, visibility, kv))

    def reduce_logits(self, rows: Tensor, fn: Callable[..., ReductionT], *row_arguments: Tensor) -> ReductionT:
        """Return the result of `HuggingFaceDenoiser.reduce_logits`, computed with the followers."""
        return self._run_with_followers(Call.LOGITS, lambda: self._sharded.reduce_logits(rows, fn, *row_arguments))

    def stop(self) -> None:
        """End the followers' loops."""
        if not self.is_lost:
            self._group.send(Call.STOP)

    def _run_with_followers(self, call: Call, run: Callable[[], T]) -> T:
        if self.is_lost:
            raise RuntimeError("the processes that share this network have lost each other")
        try:
            self._group.send(call)
            return run()
        except BaseException:
            self.is_lost = True
            raise


@torch.no_grad()
def follow(group: Group, denoiser: HuggingFaceDenoiser) -> None:
    """Repeat the leader's calls with dummy inputs until the leader stops.

    Raises:
        RuntimeError: if the leader or another follower has ended.
    """
    embedding = denoiser.embedding
    token = torch.zeros(1, 1, dtype=torch.int64, device=embedding.device)
    hidden = torch.zeros(1, embedding.shape[1], dtype=embedding.dtype, device=embedding.device)  # [1, D]
    dist.barrier(group.calls)
    while (call := group.receive()) is not Call.STOP:
        if call is Call.HIDDEN:
            denoiser.hidden(token, Visibility("causal"))
        else:
            denoiser.reduce_logits(hidden, lambda logits: logits)
