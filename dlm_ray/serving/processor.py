"""Converts requests to jobs of the engine, and scores texts. Every error of a request is an ApiError."""

from __future__ import annotations

import math
import secrets
import time
import warnings

import numpy as np
import torch

from dlm_ray.config.errors import UserError
from dlm_ray.config.sampling import ResolvedSampling
from dlm_ray.config.server import Server
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.sampling import SamplingOptions, resolve_sampling
from dlm_ray.generation.text_model import TextModel
from dlm_ray.serving.engine import Engine
from dlm_ray.serving.errors import ApiError
from dlm_ray.serving.jobs import Job
from dlm_ray.serving.messages import Event, ModelCard, Score, Task

DEFAULT_COMPLETION_TOKENS = 16


class RequestProcessor:
    """Validates requests against a checkpoint and the limits of the service, tokenizes them, and scores texts.

    Args:
        model: the checkpoint.
        engine: generates the texts.
        server: limits, names and deadline.
    """

    def __init__(self, model: TextModel, engine: Engine, server: Server):
        self.model, self.server = model, server
        self._target = model.sampling_target()
        self._sizes = engine.block_sizes
        room = model.sequence_length - 1  # after the start token
        self._max_prompt = min(room, server.limits.prompt_tokens or room)

    def card(self) -> ModelCard:
        """Return the entry of the model in /v1/models."""
        limits, kind = self.server.limits, self._target.kind
        has_whole = None in self._sizes
        [served] = self.server.served
        return {
            "id": self.server.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "dlm_ray",
            "checkpoint": {"name": "/".join(served.checkpoint.rstrip("/").split("/")[-2:]), "weights": served.weights},
            "kind": kind,
            "capabilities": {
                "completions": True,
                "chat": self.model.tokenizer.chat_template is not None,
                "infill": kind == "whole",
                "score": self.model.objective.likelihood,
                "denoising_stream": True,
                "batch_invariant": self.server.engine.batch_invariant,
            },
            "rules": list(self.model.rules),
            "block_tokens": [size for size in self._sizes if size is not None],
            "whole_canvas": has_whole,
            "context_tokens": self.model.sequence_length,
            "limits": {
                "prompt_tokens": self._max_prompt,
                "output_tokens": min(limits.output_tokens, self.model.sequence_length - 1)
                if has_whole
                else limits.output_tokens,
                "steps": limits.steps,
                "choices": limits.choices,
                "score_draws": limits.score_draws,
                "timeout_seconds": self.server.engine.deadline_seconds,
            },
            "defaults": {"temperature": self._target.sampling.temperature, "top_p": self._target.sampling.top_p},
        }

    def jobs(self, task: Task) -> tuple[list[Job], Event]:
        """Return the jobs of a task, and the event with its prompt tokens and seed."""
        prompts = self._prompts(task)
        suffix = None if task["suffix"] is None else self._encoded(task["suffix"], "suffix")
        if suffix is not None and self._target.kind != "whole":
            raise ApiError(
                400,
                "this checkpoint cannot infill: its tokens see no suffix; /v1/models lists its capabilities",
                "cannot_infill",
                "suffix",
            )
        if suffix is not None and task["options"].get("block_tokens") is not None:
            raise _invalid("block_tokens", "a block sees no suffix; leave block_tokens out to infill")
        jobs = []
        seed = secrets.randbits(32) if task["seed"] is None else task["seed"]
        deadline = time.monotonic() + min(
            task["timeout_seconds"] or self.server.engine.deadline_seconds, self.server.engine.deadline_seconds
        )
        for prompt in prompts:
            lengths = self._lengths(task, len(prompt), len(suffix or ()))
            for length in lengths:
                params = self._params(task["options"], length)
                for number in range(task["n"]):
                    ids = self.model.prompt_ids(prompt)
                    job = Job(
                        task["request_id"],
                        ids,
                        length,
                        params,
                        suffix,
                        seed,
                        number,
                        tuple(task["stops"]),
                        task["stream_canvas"],
                        deadline,
                        task["is_streamed"],
                    )
                    jobs.append(job)
        if len(jobs) > self.server.limits.choices:
            raise ApiError(
                400,
                f"{len(jobs)} texts in one request (prompts times n); at most {self.server.limits.choices}; lower n or "
                "send fewer prompts",
                "too_many_choices",
                "n",
            )
        return jobs, {
            "prompt_tokens": sum(len(prompt) for prompt in prompts) + len(suffix or ()) * len(prompts),
            "seed": seed,
        }

    def scored_ids(self, text: str, draws: int) -> list[int]:
        """Return the ids of a text to score; raise ApiError if it cannot be scored."""
        if self.model.objective.likelihood == "none":
            raise ApiError(400, "this checkpoint's objective bounds no likelihood", "cannot_score")
        if draws > self.server.limits.score_draws:
            raise _invalid("draws", f"{draws} draws; at most {self.server.limits.score_draws}")
        ids = self.model.prompt_ids(self._encoded(text, "text"))
        if len(ids) < 2:
            raise _invalid("text", "text: it has no tokens, and so no probability; send a longer one")
        if len(ids) > self.model.sequence_length:
            raise ApiError(
                400,
                f"{len(ids) - 1} tokens; the context has room for {self.model.sequence_length - 1}",
                "context_length_exceeded",
                "text",
            )
        return ids

    @torch.no_grad()
    def score(self, ids: list[int], num_bytes: int, draws: int, seed: int) -> Score:
        """Return the exact nats (autoregressive) or their bound (diffusion) of a text, with the interval over draws."""
        model = self.model
        scored = likelihood.token_nats(
            model.denoiser,
            model.objective,
            np.array([ids], dtype=np.int64),
            np.zeros((1, len(ids)), dtype=np.int64),
            lambda ids: Visibility(model.pattern),
            model.device,
            num_draws=draws,
            seed=seed,
        )
        nats = float(scored.nats.sum())
        if not math.isfinite(nats):
            raise ValueError(f"the bound of {len(ids) - 1} tokens is {nats}")
        return {
            "nats": nats,
            "bits_per_byte": likelihood.bits_per_byte(nats, num_bytes),
            "is_bound": model.objective.likelihood == "bound",
            "ci95_draws": likelihood.draws_interval(scored.draw_totals, num_bytes),
            "draws": len(scored.draw_totals),
            "tokens": len(ids) - 1,
            "bytes": num_bytes,
        }

    def _prompts(self, task: Task) -> list[list[int]]:
        """Return the ids of each prompt, without a start token."""
        if task["messages"] is not None:
            return [self._templated(task["messages"])]
        return [
            self._encoded(prompt, "prompt") if isinstance(prompt, str) else self._checked(prompt)
            for prompt in task["prompts"]
        ]

    def _encoded(self, text: str, field: str) -> list[int]:
        """Return the ids of a text, none of which is a control token."""
        try:
            return self._known(self.model.encode(text), field)
        except UserError as error:
            raise _invalid(field, f"{field}: {error}") from error

    def _checked(self, ids: list[int]) -> list[int]:
        """Return a prompt of ids without start tokens; ids, unlike text, may be control tokens."""
        return self.model.prompt_ids(self._known(ids, "prompt"))[1:]

    def _known(self, ids: list[int], field: str) -> list[int]:
        """Return ids that the network and the tokenizer both have; raise ApiError for others, and for the mask."""
        most = min(self.model.tokenizer_identity.vocab_size, len(self.model.denoiser.embedding))
        if any(token >= most for token in ids):
            raise _invalid(field, f"{field}: ids are below {most}")
        try:
            self.model.check_unmasked(ids)
        except UserError as error:
            raise _invalid(field, f"{field}: {error}") from error
        return ids

    def _templated(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of a chat by the tokenizer's template."""
        if self.model.tokenizer.chat_template is None:
            raise ApiError(
                400,
                "this checkpoint's tokenizer has no chat template; use /v1/completions",
                "no_chat_template",
                "messages",
            )
        try:
            return self.model.encode_chat(messages)
        except UserError as error:
            raise _invalid("messages", str(error)) from error
        except Exception as error:  # a template is code of the checkpoint, which may raise anything
            raise ApiError(
                400, f"the chat template refuses these messages: {error}", "invalid_messages", "messages"
            ) from error

    def _lengths(self, task: Task, num_prompt: int, num_suffix: int) -> list[int]:
        """Return the tokens to generate for each text of a prompt."""
        is_bounded = (task["options"].get("block_tokens") or self._sizes[0]) is None
        room = self.model.sequence_length - 1 - num_prompt - num_suffix
        if num_prompt > self._max_prompt or room < 1:
            raise ApiError(
                400,
                f"{num_prompt + num_suffix} tokens of prompt; at most {self._max_prompt}, with room for one more token",
                "context_length_exceeded",
                "prompt" if task["messages"] is None else "messages",
            )
        allowed = min(self.server.limits.output_tokens, room) if is_bounded else self.server.limits.output_tokens
        if not task["lengths"]:
            return [min(allowed, room) if task["messages"] is not None else min(allowed, DEFAULT_COMPLETION_TOKENS)]
        longest = max(task["lengths"])
        if longest > allowed:
            raise ApiError(
                400,
                f"{task['length_field']}={longest}; at most {allowed} after this prompt",
                "context_length_exceeded",
                task["length_field"],
            )
        return list(task["lengths"])

    def _params(self, options: SamplingOptions, length: int) -> ResolvedSampling:
        """Return the options of sampling of a text; raise ApiError if the service does not allow them."""
        size = options.get("block_tokens")
        if size is not None and size not in self._sizes:
            sizes = ", ".join(str(served) for served in self._sizes if served) or "whole texts only"
            raise _invalid("block_tokens", f"block_tokens={size}; this service has {sizes}")
        steps = options.get("steps")
        if steps is not None and steps > self.server.limits.steps:
            raise _invalid("steps", f"steps={steps}; at most {self.server.limits.steps}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the operator allowed sizes that differ from training
                return resolve_sampling(options, self._target, length)
        except UserError as error:
            raise _invalid(error.field, str(error)) from error


def _invalid(field: str | None, message: str) -> ApiError:
    """Return the error about the value of a field."""
    return ApiError(400, message, "invalid_value", field)
