"""What a served checkpoint is told: which model, how many slots, where it listens, what it allows, how it scales."""

from __future__ import annotations

import ipaddress
import math
from typing import Annotated, Literal

from pydantic import Field

from dlm_ray.config.parts import NonNegative, Part, Positive

Seconds = Annotated[float, Field(gt=0.0)]


class Engine(Part):
    """Denoising in one replica."""

    slots: Positive = 32
    """Texts that are denoised at once; each choice of a request takes one."""
    batch_invariant: bool = False
    """Every network call has the same shape, so that a text has the same bits alone and in company; costs what empty slots cost."""
    block_tokens: tuple[Positive, ...] = ()
    """Sizes of blocks that requests may ask for beside the trained one; each has a KV cache of its own."""
    prefix_cache_mib: NonNegative = 256
    """Memory for keys and values of what prompts begin with, for each size of blocks: requests that begin alike compute it once. 0: nothing is kept."""
    max_waiting: NonNegative = 64
    """Texts of a replica that wait for a slot; beyond, requests are answered 503 with Retry-After."""
    deadline_seconds: Seconds = 120.0
    """A request that is not finished by then ends with an error; requests may ask for less."""


class Limits(Part):
    """What one request, and one key, may ask for."""

    body_bytes: Positive = 1 << 20
    prompt_tokens: Positive | None = None
    """The checkpoint's context without it."""
    output_tokens: Positive = 4096
    """Of one text; on the whole canvas the context bounds it, too."""
    steps: Positive = 1024
    choices: Positive = 16
    """Texts of one request: prompts times n."""
    score_draws: Positive = 64
    requests_per_key: Positive = 64
    """At once; beyond, 429 with Retry-After."""


class Http(Part):
    """Where the service listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    api_keys_file: str | None = None
    """A file with one key a line. DLM_RAY_API_KEYS, separated by commas, does the same; keys never stand in this file."""
    playground: bool = True

    @property
    def is_public(self) -> bool:
        """Whether others than this machine reach it."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"


class Autoscaling(Part):
    """Between so many replicas, by requests under way."""

    min_replicas: Positive = 1
    max_replicas: Positive
    target_requests: Positive | None = None
    """Of a replica; its slots without it."""
    upscale_delay_seconds: Seconds = 10.0
    downscale_delay_seconds: Seconds = 120.0


class Replicas(Part):
    """Of the engine."""

    count: Positive = 1
    autoscaling: Autoscaling | None = None
    shards: Positive = 1
    """Processes that hold a replica's network together, on one node, for networks that do not fit one GPU: they share its memory, not its work."""
    cpus: Annotated[float, Field(gt=0.0)] = 1.0
    """Of each shard."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """Of each shard, at most 1."""
    drain_seconds: Seconds = 60.0
    """When a replica stops, what it has accepted may take so long."""


class Server(Part):
    """One service."""

    checkpoint: str
    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:/-]+$")] | None = None
    """What requests call the model; the last part of the checkpoint's path without it."""
    weights: Literal["ema", "raw"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Engine = Engine()
    limits: Limits = Limits()
    http: Http = Http()
    replicas: Replicas = Replicas()

    @property
    def model_name(self) -> str:
        """What requests call the model."""
        return self.name or self.checkpoint.rstrip("/").rpartition("/")[2] or "model"

    def contradictions(self) -> list[str]:
        """What cannot be had together."""
        found, scaling = [], self.replicas.autoscaling
        if scaling is not None and scaling.max_replicas < scaling.min_replicas:
            found.append(
                f"replicas.autoscaling.max_replicas={scaling.max_replicas} is less than min_replicas={scaling.min_replicas}; change either"
            )
        gpus, shards = self.replicas.gpus, self.replicas.shards
        if gpus > 1:
            found.append(
                f"replicas.gpus={gpus:g} is more than the 1 that a process uses; set it to 1, and replicas.shards={math.ceil(gpus)} for a network "
                "that does not fit one GPU, or replicas.count for more replicas"
            )
        if shards > 1 and 0 < gpus < 1:
            found.append(f"replicas.gpus={gpus:g} with replicas.shards={shards}: each shard has a GPU of its own; set it to 1, or to 0")
        return found
