"""The interface between the engine and the samplers that denoise sequences in slots."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from dlm_ray.diffusion.samplers.canvases import CanvasRequest, CanvasState
from dlm_ray.diffusion.samplers.requests import GenerationOutput, Request, SequenceState

SlotRequest = Request | CanvasRequest
"""A request of a block sampler or of a canvas sampler."""
RunningSequence = SequenceState | CanvasState
"""A request in a slot, with its ids and its number of network calls."""
FinishedSequence = GenerationOutput | CanvasState
"""A finished request, with its ids without the prompt, and its number of network calls."""
RequestT = TypeVar("RequestT", Request, CanvasRequest, contravariant=True)


class SlotSampler(Protocol[RequestT]):
    """A sampler with a fixed number of slots; `BlockSampler` and `CanvasSampler` implement it.

    A `tick` that raises leaves every sequence before or after a step, never within one, so the caller may repeat it.
    """

    finished: list[Any]
    """Finished sequences (`FinishedSequence`); the caller clears the list."""

    @property
    def num_active(self) -> int:
        """Return the number of slots in use."""

    def add(self, requests: Sequence[RequestT]) -> None:
        """Add requests to free slots, and encode their prompts; add none of them if that raises."""

    def remove(self, request: RequestT) -> None:
        """Free the slots of a request, which never appears in `finished`."""

    def running(self) -> Iterator[tuple[RunningSequence, Tensor, Tensor, Tensor]]:
        """Yield each running sequence with the ids [K], mask [K] and log-probabilities [K] of its current block."""

    def tick(self, only: Collection[RequestT] | None = None) -> None:
        """Run one denoising step of all slots in one network call.

        Args:
            only: the requests that take part; None for all.
        """
