"""A network that several processes hold: one leads, the others follow each of its calls, so that all gather the same parameters in the same order.

The leader alone decides anything: requests, the cache and the draws are its own, and its texts are those of one device, bit for bit. A follower runs
a dummy row through every call and uses nothing of it. So the processes share the memory of the parameters, and not the work: this is for
networks that do not fit one device, and slower than one device that they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models.denoiser import HuggingFaceDenoiser

# Everybody takes part in a gathering within so many seconds; for the next call a follower waits for as long as there is none.
_GATHERING = timedelta(seconds=120)
_IDLE = timedelta(days=365)


class Call(IntEnum):
    """What the leader is about to do."""

    STOP = 0
    HIDDEN = 1
    LOGITS = 2


@dataclass(frozen=True)
class Group:
    """The processes that hold a network together, as one of them knows them."""

    mesh: DeviceMesh
    """For parameters."""
    calls: dist.ProcessGroup
    """For announcements, between hosts' memories."""

    def tell(self, call: Call) -> None:
        """Rank 0 announces a call."""
        dist.broadcast(torch.tensor(int(call)), src=0, group=self.calls)

    def hear(self) -> Call:
        """The others wait for it."""
        call = torch.empty((), dtype=torch.int64)
        dist.broadcast(call, src=0, group=self.calls)
        return Call(int(call))


def meeting_place() -> dist.TCPStore:
    """A store on a free port of this machine, where the processes of a group find each other; rank 0 keeps it for as long as they are together."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_GATHERING)


def join(rank: int, num_shards: int, store: dist.TCPStore | int, device: torch.device) -> Group:
    """Collective: makes this process one of a group, all of which are on one machine.

    Args:
        rank: 0 leads.
        num_shards: processes of the group.
        store: rank 0's meeting place, or for others its port.
        device: of its part.
    """
    if isinstance(store, int):
        store = dist.TCPStore("127.0.0.1", store, is_master=False, timeout=_GATHERING)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_shards, timeout=_GATHERING)
    return Group(init_device_mesh(device.type, (num_shards,)), dist.new_group(backend="gloo", timeout=_IDLE))


def leave() -> None:
    """Closes this process's connections, so that the others see that it is gone."""
    dist.destroy_process_group()


class Leader:
    """Rank 0's side: from here on, every call of the network's `hidden` or `reduce_logits` is announced first. One thread at a time.

    Collective: it is whole when all have loaded.
    """

    def __init__(self, group: Group, denoiser: HuggingFaceDenoiser):
        self._group = group
        self.is_lost = False
        """After a call that failed the ranks are at different places, and nothing brings them together again."""
        led: Any = denoiser
        led.hidden, led.reduce_logits = self._led(Call.HIDDEN, led.hidden), self._led(Call.LOGITS, led.reduce_logits)
        dist.barrier(group.calls)

    def stop(self) -> None:
        """Lets the followers go."""
        if not self.is_lost:
            self._group.tell(Call.STOP)

    def _led(self, call: Call, method: Callable[..., Any]) -> Callable[..., Any]:
        def announced(*arguments: Any) -> Any:
            if self.is_lost:
                raise RuntimeError("the processes that hold this network have lost each other")
            try:
                self._group.tell(call)
                return method(*arguments)
            except BaseException:
                self.is_lost = True
                raise

        return announced


@torch.no_grad()
def follow(group: Group, denoiser: HuggingFaceDenoiser) -> None:
    """The others' side, until the leader stops.

    Raises:
        RuntimeError: if the leader, or another follower, is gone.
    """
    own = denoiser.embedding
    token = torch.zeros(1, 1, dtype=torch.int64, device=own.device)
    row = torch.zeros(1, own.shape[1], dtype=own.dtype, device=own.device)  # [1, D]
    dist.barrier(group.calls)
    while (call := group.hear()) is not Call.STOP:
        if call is Call.HIDDEN:
            denoiser.hidden(token, Visibility("causal"))
        else:
            denoiser.reduce_logits(row, lambda logits: logits)
