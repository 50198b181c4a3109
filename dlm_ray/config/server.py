"""What a service is told: which models, how many slots, where it listens, what it allows, how it scales."""

from __future__ import annotations

import ipaddress
import math
from typing import Annotated, Literal

from pydantic import Field

from dlm_ray.config.parts import ConfigNode, NonNegative, Positive

Seconds = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:/-]+$")]


class Engine(ConfigNode):
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


class Limits(ConfigNode):
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


class Http(ConfigNode):
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


class Autoscaling(ConfigNode):
    """Between so many replicas, by requests under way."""

    min_replicas: Positive = 1
    max_replicas: Positive
    target_requests: Positive | None = None
    """Of a replica, those that wait for a slot included; engine.slots without it."""
    upscale_delay_seconds: Seconds = 10.0
    downscale_delay_seconds: Seconds = 120.0


class Replicas(ConfigNode):
    """Of the engine."""

    count: Positive = 1
    autoscaling: Autoscaling | None = None
    shards: Positive = 1
    """Processes that hold a replica's network together, on one node, for networks that do not fit one GPU: they share its memory, not its work."""
    cpus: Annotated[float, Field(gt=0.0)] = 1.0
    """Of each shard."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """Of each shard, at most 1."""
    models: Positive | None = None
    """That one replica holds at once, all without it. When another is asked for, the one that was asked for longest ago goes, after its texts have ended."""
    drain_seconds: Seconds | None = None
    """When a replica stops, what it has accepted may take so long; as long as a request may (engine.deadline_seconds) without it."""


class Model(ConfigNode):
    """A checkpoint, and what requests call it."""

    checkpoint: str
    """A step, a run directory (its last step when the service starts), a Hugging Face folder, a hub name or a GGUF file."""
    name: Name | None = None
    """The last part of the checkpoint's path without it."""
    weights: Literal["ema", "raw"] | None = None
    """The average if the run kept one, without it."""

    @property
    def model_name(self) -> str:
        """What requests call it."""
        return self.name or self.checkpoint.rstrip("/").rpartition("/")[2] or "model"


class Server(ConfigNode):
    """One service: of one checkpoint, or of several `models` behind one address."""

    checkpoint: str | None = None
    """As `models.checkpoint`, `name` and `weights` too; of a service of one model."""
    name: Name | None = None
    weights: Literal["ema", "raw"] | None = None
    models: tuple[Model, ...] = ()
    """Each has engines of its own, all with the settings of `engine`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Engine = Engine()
    limits: Limits = Limits()
    http: Http = Http()
    replicas: Replicas = Replicas()

    @property
    def served(self) -> tuple[Model, ...]:
        """All models."""
        if self.checkpoint is None:
            return self.models
        return (Model(checkpoint=self.checkpoint, name=self.name, weights=self.weights), *self.models)

    @property
    def model_names(self) -> list[str]:
        """What requests call them."""
        return [model.model_name for model in self.served]

    @property
    def models_at_once(self) -> int:
        """Models that one replica holds."""
        return self.replicas.models or len(self.served)

    @property
    def drain_seconds(self) -> float:
        """What a replica has accepted ends by then."""
        return self.replicas.drain_seconds or self.engine.deadline_seconds

    def of(self, model: Model) -> Server:
        """The same of one model."""
        return self.model_copy(update={**dict(model), "models": ()})

    @property
    def model_name(self) -> str:
        """What requests call the one model."""
        [name] = self.model_names
        return name

    def contradictions(self) -> list[str]:
        """What cannot be had together."""
        found = [] if self.served else ["checkpoint is missing; name one, or several under models"]
        if self.models and any(value is not None for value in (self.checkpoint, self.name, self.weights)):
            found.append(
                "checkpoint, name and weights are of a service of one model, and there are models, too; put all under models"
            )
        first: dict[str, int] = {}
        for place, name in enumerate(model.model_name for model in self.models):
            if first.setdefault(name, place) != place:
                found.append(f"models.{place}.name={name} is models.{first[name]}'s, too; give each a name of its own")
        most = self.replicas.models
        if most is not None and self.served and most > len(self.served):
            found.append(f"replicas.models={most}, and there are {len(self.served)} to hold; lower it, or leave it out")
        scaling = self.replicas.autoscaling
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
        if shards > 1 and len(self.served) > 1:
            found.append(
                f"replicas.shards={shards}, and there are {len(self.served)} models; a sharded replica holds one: serve each on its own"
            )
        if shards > 1 and 0 < gpus < 1:
            found.append(
                f"replicas.gpus={gpus:g} with replicas.shards={shards}: each shard has a GPU of its own; set it to 1, or to 0"
            )
        return found
