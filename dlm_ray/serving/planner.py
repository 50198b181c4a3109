"""From a request to jobs of the engine: tokens, lengths, sampling options, limits; and the bound of a text. Every mistake is an ApiError."""

from __future__ import annotations

import math
import re
import secrets
import time
import warnings
from typing import Any

import numpy as np
import torch

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.sampling import resolve_sampling
from dlm_ray.generation.text_model import TextModel
from dlm_ray.serving.engine import Engine
from dlm_ray.serving.errors import ApiError
from dlm_ray.serving.jobs import Job, Task

DEFAULT_COMPLETION_TOKENS = 16


class Planner:
    """Knows what the checkpoint can and what the service allows."""

    def __init__(self, model: TextModel, engine: Engine, server: Server):
        self.model, self.server = model, server
        self._sampled = model.sampled_as()
        self._sizes = engine.block_sizes
        own = model.sequence_length - 1  # behind the start token
        self._max_prompt = min(own, server.limits.prompt_tokens or own)

    def card(self) -> dict[str, Any]:
        """For /v1/models."""
        limits, kind = self.server.limits, self._sampled.kind
        has_whole = None in self._sizes
        [own] = self.server.served
        return {
            "id": self.server.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "dlm_ray",
            "checkpoint": {"name": "/".join(own.checkpoint.rstrip("/").split("/")[-2:]), "weights": own.weights},
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
            "defaults": {"temperature": self._sampled.sampling.temperature, "top_p": self._sampled.sampling.top_p},
        }

    def jobs(self, task: Task) -> tuple[list[Job], dict[str, Any]]:
        """The jobs of a task, and the event that says what was understood."""
        prompts = self._prompts(task)
        suffix = None if task["suffix"] is None else self._encoded(task["suffix"], "suffix")
        if suffix is not None and self._sampled.kind != "whole":
            raise ApiError(
                400,
                "this checkpoint cannot infill: what it denoises sees no suffix; /v1/models lists what it can",
                "cannot_infill",
                "suffix",
            )
        if suffix is not None and task["options"].get("block_tokens") is not None:
            raise ApiError(
                400, "a block sees no suffix; leave block_tokens out to infill", "invalid_value", "block_tokens"
            )
        jobs = []
        seed = secrets.randbits(32) if task["seed"] is None else task["seed"]
        deadline = time.monotonic() + min(
            task["timeout_seconds"] or self.server.engine.deadline_seconds, self.server.engine.deadline_seconds
        )
        for prompt in prompts:
            lengths = self._lengths(task, len(prompt), len(suffix or ()))
            for length in lengths:
                chosen = self._chosen(task["options"], length)
                for number in range(task["n"]):
                    ids = self.model.prompt_ids(prompt)
                    own = (
                        suffix,
                        seed,
                        number,
                        tuple(task["stops"]),
                        task["stream_canvas"],
                        deadline,
                        task["is_streamed"],
                    )
                    jobs.append(Job(task["request_id"], ids, length, chosen, *own))
        if len(jobs) > self.server.limits.choices:
            raise ApiError(
                400,
                f"{len(jobs)} texts in one request (prompts times n); at most {self.server.limits.choices}; lower n or send fewer prompts",
                "too_many_choices",
                "n",
            )
        return jobs, {
            "prompt_tokens": sum(len(prompt) for prompt in prompts) + len(suffix or ()) * len(prompts),
            "seed": seed,
        }

    def scored_ids(self, text: str, draws: int) -> list[int]:
        """The ids of a text that is to be scored."""
        if self.model.objective.likelihood == "none":
            raise ApiError(400, "this checkpoint's objective bounds no likelihood", "cannot_score")
        if draws > self.server.limits.score_draws:
            raise ApiError(400, f"{draws} draws; at most {self.server.limits.score_draws}", "invalid_value", "draws")
        ids = self.model.prompt_ids(self._encoded(text, "text"))
        if len(ids) < 2:
            raise ApiError(
                400, "text: it has no tokens, and so no probability; send more of it", "invalid_value", "text"
            )
        if len(ids) > self.model.sequence_length:
            raise ApiError(
                400,
                f"{len(ids) - 1} tokens; the context has room for {self.model.sequence_length - 1}",
                "context_length_exceeded",
                "text",
            )
        return ids

    @torch.no_grad()
    def score(self, ids: list[int], num_bytes: int, draws: int, seed: int) -> dict[str, Any]:
        """The exact nats of an autoregressive model, or the bound; the interval is over draws."""
        model = self.model
        found = likelihood.token_nats(
            model.denoiser,
            model.objective,
            np.array([ids], dtype=np.int64),
            np.zeros((1, len(ids)), dtype=np.int64),
            lambda ids: Visibility(model.pattern),
            model.device,
            num_draws=draws,
            seed=seed,
        )
        nats = float(found.nats.sum())
        if not math.isfinite(nats):
            raise ValueError(f"the bound of {len(ids) - 1} tokens is {nats}")
        return {
            "nats": nats,
            "bits_per_byte": likelihood.bits_per_byte(nats, num_bytes),
            "is_bound": model.objective.likelihood == "bound",
            "ci95_draws": likelihood.draws_interval(found.draw_totals, num_bytes),
            "draws": len(found.draw_totals),
            "tokens": len(ids) - 1,
            "bytes": num_bytes,
        }

    def _prompts(self, task: Task) -> list[list[int]]:
        if task["messages"] is not None:
            return [self._templated(task["messages"])]
        return [
            self._encoded(prompt, "prompt") if isinstance(prompt, str) else self._checked(prompt)
            for prompt in task["prompts"]
        ]

    def _encoded(self, text: str, field: str) -> list[int]:
        """The ids of a text, in which nothing is a control token."""
        try:
            return self._known(self.model.encode(text), field)
        except UserError as error:
            raise ApiError(400, f"{field}: {error}", "invalid_value", field) from error

    def _checked(self, ids: list[int]) -> list[int]:
        """A prompt of ids, behind the start token; a caller who sends ids may send control tokens."""
        return self.model.prompt_ids(self._known(ids, "prompt"))[1:]

    def _known(self, ids: list[int], field: str) -> list[int]:
        """Ids that the network has an embedding of and the tokenizer a text, and none of which is the mask."""
        most = min(self.model.tokenizer_identity.vocab_size, len(self.model.denoiser.embedding))
        if any(token >= most for token in ids):
            raise ApiError(400, f"{field}: ids are below {most}", "invalid_value", field)
        try:
            self.model.check_unmasked(ids)
        except UserError as error:
            raise ApiError(400, f"{field}: {error}", "invalid_value", field) from error
        return ids

    def _templated(self, messages: list[dict[str, str]]) -> list[int]:
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
            raise ApiError(400, str(error), "invalid_value", "messages") from error
        except (
            Exception
        ) as error:  # a template is a program of somebody else's, and what it cannot do is the request's mistake
            raise ApiError(
                400, f"the chat template refuses these messages: {error}", "invalid_messages", "messages"
            ) from error

    def _lengths(self, task: Task, num_prompt: int, num_suffix: int) -> list[int]:
        """Tokens to write of every candidate."""
        is_bounded = (task["options"].get("block_tokens") or self._sizes[0]) is None
        room = self.model.sequence_length - 1 - num_prompt - num_suffix
        if num_prompt > self._max_prompt or room < 1:
            raise ApiError(
                400,
                f"{num_prompt + num_suffix} tokens of prompt; at most {self._max_prompt}, with room for one of the text",
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
                f"{task['length_field']}={longest}; at most {allowed} behind this prompt",
                "context_length_exceeded",
                task["length_field"],
            )
        return list(task["lengths"])

    def _chosen(self, options: dict[str, Any], length: int) -> Any:
        size = options.get("block_tokens")
        if size is not None and size not in self._sizes:
            raise ApiError(
                400,
                f"block_tokens={size}; this service has {', '.join(str(one) for one in self._sizes if one) or 'the whole canvas alone'}",
                "invalid_value",
                "block_tokens",
            )
        if options.get("steps", 0) > self.server.limits.steps:
            raise ApiError(
                400, f"steps={options['steps']}; at most {self.server.limits.steps}", "invalid_value", "steps"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # of sizes that were not trained: whoever serves has allowed them
                return resolve_sampling(options, self._sampled, length)  # type: ignore[arg-type]
        except UserError as error:
            message = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda found: found[1].replace("-", "_"), str(error))
            raise ApiError(400, message, "invalid_value", message.split(" ", 1)[0]) from error
