"""The configuration of a service: models, slots, address, limits and scaling."""

from __future__ import annotations

import ipaddress
import math
from typing import Annotated, Literal

from pydantic import Field

from dlm_ray.config.parts import ConfigNode, NonNegative, Positive

Seconds = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:/-]+$")]


class EngineSettings(ConfigNode):
    """The denoising engine of each model in a replica."""

    slots: Positive = 32
    """Sequences that are denoised at once; each choice of a request takes one slot."""
    batch_invariant: bool = False
    """Give every network call the same shape, so that a sequence has the same bits whatever else is in the batch. Empty
    slots then cost as much as full ones."""
    block_tokens: tuple[Positive, ...] = ()
    """Block sizes that requests may choose in addition to the trained one; each has its own KV cache."""
    prefix_cache_mib: NonNegative = 256
    """Memory in MiB, per block size, for keys and values of prompt prefixes: requests that begin alike compute them
    once. 0 turns the prefix cache off."""
    max_waiting: NonNegative = 64
    """Sequences that may wait for a slot of a replica; further requests get 503 with Retry-After."""
    deadline_seconds: Seconds = 120.0
    """Seconds after which an unfinished request ends with an error; a request may ask for less."""


class Limits(ConfigNode):
    """Limits of one request, and of one API key."""

    body_bytes: Positive = 1 << 20
    """Size of a request body in bytes."""
    prompt_tokens: Positive | None = None
    """Prompt length in tokens; by default bounded by the checkpoint's context only."""
    output_tokens: Positive = 4096
    """Output length in tokens per choice; the context bounds it, too, unless the checkpoint samples by blocks."""
    steps: Positive = 1024
    """Denoising steps that a request may ask for."""
    choices: Positive = 16
    """Choices per request: prompts times n."""
    score_draws: Positive = 64
    """Draws of (t, mask) that a request to /v1/score may ask for."""
    requests_per_key: Positive = 64
    """Concurrent requests per API key; further ones get 429 with Retry-After."""


class Http(ConfigNode):
    """Address of the service and access to it."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but a loopback address is reachable from other machines and needs API keys."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """TCP port to listen on."""
    api_keys_file: str | None = None
    """File with one API key per line. The environment variable DLM_RAY_API_KEYS (separated by commas) works, too; keys
    are never written into this configuration."""
    playground: bool = True
    """Serve the playground page at the root of the address."""

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach the service."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"


class Autoscaling(ConfigNode):
    """A range of replicas; the number follows the running requests."""

    min_replicas: Positive = 1
    """Fewest replicas."""
    max_replicas: Positive
    """Most replicas."""
    target_requests: Positive | None = None
    """Running and waiting requests per replica to aim for; `engine.slots` by default."""
    upscale_delay_seconds: Seconds = 10.0
    """Seconds of high load before replicas are added."""
    downscale_delay_seconds: Seconds = 120.0
    """Seconds of low load before replicas are removed."""


class Replicas(ConfigNode):
    """Replicas of the engine and their resources."""

    count: Positive = 1
    """Number of replicas, if `autoscaling` is not set."""
    autoscaling: Autoscaling | None = None
    """Number of replicas by load."""
    shards: Positive = 1
    """Processes on one node that share a replica's network with FSDP2, for networks that do not fit one GPU: this saves
    memory and gains no speed (it is not tensor parallelism)."""
    cpus: Annotated[float, Field(gt=0.0)] = 1.0
    """CPUs that Ray reserves per shard."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs that Ray reserves per shard, at most 1. With 0, replicas run on the CPU; set 1 to serve on GPUs."""
    models: Positive | None = None
    """Models that a replica holds at once; all by default. To load another one, a replica drops the least recently
    requested model after its running sequences have finished."""
    drain_seconds: Seconds | None = None
    """Seconds that a stopping replica may take to finish accepted requests; `engine.deadline_seconds` by default."""


class Model(ConfigNode):
    """A checkpoint and its name in requests."""

    checkpoint: str
    """Step directory, run directory (its last step when the service starts), Hugging Face folder, hub name or GGUF
    file."""
    name: Name | None = None
    """Model name in requests; by default the last part of the checkpoint's path."""
    weights: Literal["ema", "raw"] | None = None
    """Averaged or raw weights; by default the average if the run kept one."""

    @property
    def model_name(self) -> str:
        """Model name in requests."""
        return self.name or self.checkpoint.rstrip("/").rpartition("/")[2] or "model"


class Server(ConfigNode):
    """A service of one `checkpoint`, or of several `models` at one address."""

    checkpoint: str | None = None
    """Checkpoint of a service of one model; see `models.checkpoint`."""
    name: Name | None = None
    """Model name of a service of one model; see `models.name`."""
    weights: Literal["ema", "raw"] | None = None
    """Weights of a service of one model; see `models.weights`."""
    models: tuple[Model, ...] = ()
    """Models of a service of several; each has its own engines, all with the settings of `engine`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that the networks run on; `auto` takes CUDA where the replica sees a GPU (see `replicas.gpus`), else the
    CPU."""
    engine: EngineSettings = EngineSettings()
    """Denoising engine."""
    limits: Limits = Limits()
    """Limits of requests."""
    http: Http = Http()
    """Address and access."""
    replicas: Replicas = Replicas()
    """Number of replicas and their resources."""

    @property
    def served(self) -> tuple[Model, ...]:
        """All models of the service."""
        if self.checkpoint is None:
            return self.models
        return (Model(checkpoint=self.checkpoint, name=self.name, weights=self.weights), *self.models)

    @property
    def model_names(self) -> list[str]:
        """Names of all models in requests."""
        return [model.model_name for model in self.served]

    @property
    def models_at_once(self) -> int:
        """Number of models that a replica holds at once."""
        return self.replicas.models or len(self.served)

    @property
    def drain_seconds(self) -> float:
        """Seconds in which a stopping replica finishes its accepted requests."""
        return self.replicas.drain_seconds or self.engine.deadline_seconds

    def of(self, model: Model) -> Server:
        """Return the configuration of a service of this model only."""
        return self.model_copy(update={**dict(model), "models": ()})

    @property
    def model_name(self) -> str:
        """Name of the only model; the service must have exactly one."""
        [name] = self.model_names
        return name

    def contradictions(self) -> list[str]:
        """Return every mistake that involves more than one key, each with its fix; empty if there is none."""
        return [*self._model_contradictions(), *self._replica_contradictions()]

    def _model_contradictions(self) -> list[str]:
        problems = [] if self.served else ["checkpoint is missing; give one, or several under models"]
        if self.models and any(value is not None for value in (self.checkpoint, self.name, self.weights)):
            problems.append(
                "checkpoint, name and weights are for a service of one model, and models is set, too; put all of them "
                "under models"
            )
        first: dict[str, int] = {}
        for place, name in enumerate(model.model_name for model in self.models):
            if first.setdefault(name, place) != place:
                problems.append(
                    f"models.{place}.name={name} is also the name of models.{first[name]}; give each a different name"
                )
        at_once = self.replicas.models
        if at_once is not None and self.served and at_once > len(self.served):
            problems.append(
                f"replicas.models={at_once}, and there are only {len(self.served)} models; lower it, or leave it out"
            )
        return problems

    def _replica_contradictions(self) -> list[str]:
        problems = []
        scaling = self.replicas.autoscaling
        if scaling is not None and scaling.max_replicas < scaling.min_replicas:
            problems.append(
                f"replicas.autoscaling.max_replicas={scaling.max_replicas} is less than "
                f"min_replicas={scaling.min_replicas}; change either"
            )
        gpus, shards = self.replicas.gpus, self.replicas.shards
        if gpus > 1:
            problems.append(
                f"replicas.gpus={gpus:g} is more than the 1 that a process uses; set it to 1, and "
                f"replicas.shards={math.ceil(gpus)} for a network that does not fit one GPU, or replicas.count for "
                "more replicas"
            )
        if shards > 1 and len(self.served) > 1:
            problems.append(
                f"replicas.shards={shards} with {len(self.served)} models: a sharded replica holds one model; run one "
                "service per model"
            )
        if shards > 1 and 0 < gpus < 1:
            problems.append(
                f"replicas.gpus={gpus:g} with replicas.shards={shards}: each shard needs its own GPU; set it to 1, "
                "or to 0"
            )
        return problems
