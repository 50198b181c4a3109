"""Samples tokens from the logits of several slots at once, each with the sampling parameters of its slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.samplers.adjust import Adjust
from dlm_ray.diffusion.samplers.requests import SamplingParams
from dlm_ray.diffusion.samplers.slots import Slot, by_params
from dlm_ray.diffusion.samplers.token_sampling import log_probability, nothing_allowed, sample_tokens


@dataclass(frozen=True)
class BlockProposer:
    """Proposes tokens for positions of blocks, given the hidden states that predict them."""

    denoiser: Denoiser
    adjust: Adjust | None
    """Changes the logits before tokens are sampled."""
    fixed_shapes: bool
    """Whether every call has the same number of rows of logits."""

    def propose(
        self, rows: Tensor, uniform: Tensor, position: Tensor, slot: Tensor, slots: Sequence[Slot], fixed_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, confidence and log-probability [n] each, on the host.

        Args:
            rows: [n, D] hidden states, on the device.
            uniform: [n] float64 random numbers in [0, 1).
            position: [n] positions within the block.
            slot: [n] index into `slots` of the slot that each row belongs to.
            slots: the slots that take a step.
            fixed_rows: number of rows of logits with fixed shapes.

        Raises:
            ValueError: if `adjust` leaves no token at a position, or the network's logits are not finite.
        """
        device, adjust, num_rows = rows.device, self.adjust, len(rows)
        groups = by_params(slots)
        all_params = [params for params, _ in groups]
        params_number = torch.zeros(len(slots), dtype=torch.int64)
        for number, (_, group) in enumerate(groups):
            params_number[group] = number
        arguments = [uniform.to(device), params_number[slot].to(device)]
        if adjust is not None:
            absolute = position + torch.tensor([item.sequence.block_start for item in slots])[slot]
            requests = torch.tensor([item.sequence.request.number for item in slots])[slot]
            arguments += [requests.to(device), absolute.to(device)]
        if self.fixed_shapes:  # padding rows belong to no slot and have no parameters
            padding = (0, fixed_rows - num_rows)
            rows = pad(rows, (0, 0, *padding))
            arguments = [pad(argument, padding, value=-1) for argument in arguments]

        def sample_rows(logits: Tensor, uniform: Tensor, params_number: Tensor, *places: Tensor) -> Tensor:
            if adjust is not None:
                logits = adjust(logits, *places)
            return sample_by_params(logits, uniform, params_number, all_params)

        sampled: Tensor = self.denoiser.reduce_logits(rows, sample_rows, *arguments)
        tokens, confidence, log_p = sampled[:num_rows].cpu().unbind(1)
        if bool((tokens < 0).any()):
            raise ValueError(nothing_allowed(None if adjust is None else int(absolute[tokens < 0][0])))
        return tokens.long(), confidence, log_p


def sample_by_params(
    logits: Tensor, uniform: Tensor, params_number: Tensor, all_params: Sequence[SamplingParams]
) -> Tensor:
    """Sample one token per row of logits [n, V], with the parameters `all_params[params_number]` of the row.

    Rows of number -1 are padding; their results are arbitrary.

    Returns:
        [n, 3] float64: token, the confidence that the rule ranks by, and the log-probability, which is 0 unless the
        request streams its canvas. Float64 holds token ids exactly, so a single tensor is copied from the device.
    """
    sampled = torch.zeros(len(logits), 3, dtype=torch.float64, device=logits.device)
    for number, params in enumerate(all_params):
        # With a single set of parameters, reading `params_number` would only wait for the device.
        rows = (params_number == number).nonzero()[:, 0] if len(all_params) > 1 else slice(None)
        ranking = params.rule.confidence
        tokens, ranked = sample_tokens(logits[rows], uniform[rows], params.temperature, params.top_p, ranking)
        log_p = torch.zeros_like(ranked)
        if params.stream_canvas:
            log_p = ranked if ranking == "probability" else log_probability(tokens, logits[rows])
        sampled[rows] = torch.stack((tokens, ranked, log_p), 1)
    return sampled
