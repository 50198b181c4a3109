"""A network with its tokenizer: samples, infills and scores text. `dlm_ray.load(path)` gives one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch

from dlm_ray.config.errors import UserError
from dlm_ray.config.objective import Sampling, rules_of
from dlm_ray.data.index import load_index
from dlm_ray.data.reading import read_split
from dlm_ray.data.tokenizer import TokenizerIdentity
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.diffusion.objectives import SsdLm
from dlm_ray.diffusion.samplers.adjust import banned
from dlm_ray.diffusion.samplers.rules import Ancestral, Canvas, Confidence, LeftToRight, Rule, StateDependent, Tweedie
from dlm_ray.diffusion.samplers.simplex import Control, sample_blocks
from dlm_ray.diffusion.samplers.whole_canvas import Sampled, sample
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.models.denoiser import HuggingFaceDenoiser
from dlm_ray.serving.scoring import Scored, number_documents

GRIDS = ("uniform", "cosine")
NOISES = ("float64", "float32_gumbel")
OnStep = Callable[[int, int, Canvas], None]


class SamplingOptions(TypedDict, total=False):
    """How text is sampled; what is left out, or None, is as the checkpoint's recipe says."""

    num_samples: int
    """Sampled in one batch; 1."""
    steps: int | None
    """Denoising steps (of ssd_lm: a block's). An autoregressive model takes one a token."""
    rule: str | None
    """What a step reveals: one of `TextModel.rules`."""
    grid: str | None
    """Times of the steps: `uniform`, or `cosine`, which reveals little at first."""
    temperature: float | None
    """0 takes the most probable token."""
    top_p: float | None
    """Nucleus."""
    noise: str
    """`float64`, honest; `float32_gumbel` cuts the tails as MD4's code does, for comparisons with it."""
    control: Control | None
    """Of ssd_lm: log f(y | text) [B] of token probabilities [B, K, V], whose gradient steers the text (SSD-LM, section 3.3)."""
    control_weight: float
    seed: int
    """The same seed gives the same text, whatever else is in the batch."""
    on_step: OnStep | None
    """Called with (steps done, steps, canvas)."""


class TextModel:
    """A network with its tokenizer, on one device."""

    def __init__(
        self,
        denoiser: HuggingFaceDenoiser,
        tokenizer: Any,
        tokenizer_identity: TokenizerIdentity,
        *,
        objective: Any,
        row_tokens: int,
        document_mask: bool,
        rules: tuple[str, ...] | None = None,
        sampling: Sampling | None = None,
        pattern: Literal["causal", "bidirectional"] | None = None,
    ):
        self.denoiser = denoiser.eval()
        self.tokenizer, self.tokenizer_identity = tokenizer, tokenizer_identity
        self.objective, self.is_causal = objective, bool(objective.is_causal)
        self.row_tokens, self.document_mask = row_tokens, document_mask
        self.rules = rules or rules_of("autoregressive" if self.is_causal else "masked")
        self.sampling = sampling or Sampling()
        # What it sees follows from what it is; only a base that was never adapted is tried both ways.
        self.pattern: Literal["causal", "bidirectional"] = pattern or ("causal" if self.is_causal else "bidirectional")
        self.device = next(denoiser.parameters()).device

    def sample(self, prompt: str = "", *, length_tokens: int | None = None, **options: Unpack[SamplingOptions]) -> list[str]:
        """Continuations of `prompt`, each cut at its end-of-text token.

        Args:
            prompt: kept as it is, and not part of what is returned.
            length_tokens: tokens to write; as many as the trained row has room for if None.
            options: `SamplingOptions`.

        Raises:
            UserError: if prompt and length do not fit the context, or an option is out of range or does not belong to the objective.
        """
        before = self._encode(prompt)
        room = self.row_tokens - 1 - len(before)
        if isinstance(self.objective, SsdLm):
            room -= room % self.objective.block_tokens  # the network sees whole blocks
        length = room if length_tokens is None else length_tokens
        self._check_room(length, len(before), room, "--prompt")
        sampled = self._denoise(before, length, [], **options)
        start = 1 + len(before)
        return [self._text(row[start : start + length].tolist()) for row in sampled.ids]

    def infill(self, prefix: str, suffix: str, *, length_tokens: int, **options: Unpack[SamplingOptions]) -> list[str]:
        """Texts of `length_tokens` tokens between `prefix` and `suffix`; neither side is part of what is returned.

        Raises:
            UserError: if the model cannot see a suffix, or the three do not fit the context.
        """
        if self.is_causal or isinstance(self.objective, SsdLm):
            kind = "autoregressive" if self.is_causal else "an SSD-LM, which sees nothing behind its block"
            raise UserError(f"this checkpoint is {kind}: it cannot infill (--prefix, --suffix); use --prompt, or adapt it first")
        before, after = self._encode(prefix), self._encode(suffix)
        given = len(before) + len(after)
        self._check_room(length_tokens, given, self.row_tokens - 1 - given, "--prefix and --suffix")
        sampled = self._denoise(before, length_tokens, after, **options)
        start = 1 + len(before)
        return [self._text(row[start : start + length_tokens].tolist()) for row in sampled.ids]

    def bits_per_byte(
        self, data: str, *, split: str = "held_out", max_rows: int | None = None, draws_per_row: int = 16, seed: int = 0
    ) -> dict[str, Any]:
        """Bits per byte of a split of a data folder: exact for an autoregressive model, an upper bound for a diffusion model.

        Returns:
            bits_per_byte, is_bound, ci95_documents (bootstrap), ci95_draws (given these rows; None if exact), and the counts.
        """
        return self.score(data, split=split, max_rows=max_rows, draws_per_row=draws_per_row, seed=seed).as_dict()

    def score(
        self,
        data: str,
        *,
        split: str = "held_out",
        max_rows: int | None = None,
        draws_per_row: int = 16,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Scored:
        """The same document by document.

        Raises:
            UserError: if the data was made with another tokenizer, the split is empty, or the objective bounds no likelihood.
        """
        if self.objective.likelihood == "none":
            raise UserError("this checkpoint's objective (ssd_lm) gives no bound of the likelihood: there are no bits per byte to report")
        theirs = load_index(data).tokenizer
        if theirs.sha256 != self.tokenizer_identity.sha256:
            raise UserError(
                f"{data} was made with tokenizer {theirs.name} (sha256 {theirs.sha256[:12]}) and the checkpoint with "
                f"{self.tokenizer_identity.name} ({self.tokenizer_identity.sha256[:12]}); build the data with the checkpoint's tokenizer"
            )
        rows = read_split(data, split, max_rows)
        if not rows:
            raise UserError(f"split {split!r} of {data} has no rows; build it with a larger --held-out, or name another --split")
        x_0 = np.stack([row.input_ids for row in rows]).astype(np.int64)
        document_ids = np.stack([row.document_ids for row in rows])
        scored = likelihood.token_nats(
            self.denoiser,
            self.objective,
            x_0,
            document_ids,
            lambda ids: Visibility(self.pattern, document_ids=documents_apart(ids, self.document_mask, self.device)),
            self.device,
            num_draws=draws_per_row,
            seed=seed,
            progress=progress,
        )
        documents = number_documents([row.part for row in rows], document_ids)
        num_bytes = likelihood.by_document(np.stack([row.num_bytes for row in rows]).astype(np.float64), documents)
        nats = likelihood.by_document(scored.nats, documents)
        return Scored(nats, num_bytes, scored.draw_totals, int(maskable_positions(document_ids).sum()), not self.is_causal)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _text(self, ids: list[int]) -> str:
        """The text before the first end-of-text token."""
        end = self.tokenizer_identity.end_id
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    def _check_room(self, length: int, given: int, room: int, what: str) -> None:
        if length < 1:
            raise UserError(
                f"--length is {length} tokens with {given} of {what}; the context of {self.row_tokens} needs room for at least 1"
            )
        if length > room:
            raise UserError(
                f"{given} tokens of {what} and --length {length} need {1 + given + length} positions, and the model was trained on rows of "
                f"{self.row_tokens}, which leaves {room}; shorten either"
            )

    def _denoise(self, before: list[int], length: int, after: list[int], **options: Unpack[SamplingOptions]) -> Sampled:
        """Canvases [start] before [length masked] after, denoised."""
        chosen = self._chosen(length, options)
        start_id, end_id = self.tokenizer_identity.start_id, self.tokenizer_identity.end_id
        row = torch.tensor([start_id, *before, *[end_id] * length, *after], device=self.device)
        is_masked = torch.zeros(len(row), dtype=torch.bool, device=self.device)
        is_masked[1 + len(before) : 1 + len(before) + length] = True
        canvas = Canvas(row.repeat(chosen["num_samples"], 1), is_masked.repeat(chosen["num_samples"], 1))
        common: dict[str, Any] = {
            "num_steps": chosen["steps"],
            "temperature": chosen["temperature"],
            "top_p": chosen["top_p"],
            "seed": options.get("seed", 0),
            "on_step": options.get("on_step"),
        }
        if isinstance(self.objective, SsdLm):
            banned_ids = torch.tensor(self._banned(bool(after)), dtype=torch.long, device=self.device)
            common |= {"banned_ids": banned_ids, "control": options.get("control"), "control_weight": options.get("control_weight", 0.0)}
            return sample_blocks(self.denoiser, self.objective, canvas, projection=chosen["rule"], **common)
        common["adjust"] = banned(self._banned(bool(after)))
        rule = self._rule(chosen["rule"], canvas, chosen["noise"])
        return sample(self.denoiser, canvas, rule, Visibility(self.pattern), grid=chosen["grid"], noise=chosen["noise"], **common)

    def _banned(self, has_suffix: bool) -> list[int]:
        """Ids that are never drawn: rows without a token, the start token, and before a suffix the end token."""
        start_id, end_id = self.tokenizer_identity.start_id, self.tokenizer_identity.end_id
        never: set[int] = set(range(self.tokenizer_identity.vocab_size, self.denoiser.vocab_size)) - {self.denoiser.mask_id or -1}
        if has_suffix:
            never.add(end_id)  # a text with a suffix does not end in front of it
        if start_id != end_id:
            never.add(start_id)
        return sorted(never)

    def _rule(self, name: str, canvas: Canvas, noise: str) -> Rule:
        if name == "confidence":
            return Confidence(Polynomial())
        if name == "state_dependent":
            return StateDependent(self.objective.exponents)
        if name == "tweedie":
            return Tweedie(Polynomial(), self.denoiser.vocab_size)
        return LeftToRight() if name == "left_to_right" else Ancestral(Polynomial(), joint=noise == "float32_gumbel")

    def _chosen(self, length: int, options: SamplingOptions) -> dict[str, Any]:
        """The options with the recipe's where nothing was said, after every mistake in them is reported."""
        own = self.sampling
        asked: dict[str, Any] = {
            "num_samples": options.get("num_samples", 1),
            "steps": options.get("steps"),
            "rule": options.get("rule") or own.rule or self.rules[0],
            "grid": options.get("grid") or own.grid,
            "noise": options.get("noise", "float64"),
        }
        for name in ("temperature", "top_p"):
            value = options.get(name)
            asked[name] = getattr(own, name) if value is None else value
        found = []
        if asked["num_samples"] < 1:
            found.append(f"--num-samples {asked['num_samples']}: at least 1")
        if asked["steps"] is not None and asked["steps"] < 1:
            found.append(f"--steps {asked['steps']}: at least 1")
        if asked["rule"] not in self.rules:
            found.append(f"--rule {asked['rule']} does not belong to the checkpoint's objective; one of {', '.join(self.rules)}")
        for name, allowed in (("grid", GRIDS), ("noise", NOISES)):
            if asked[name] not in allowed:
                found.append(f"--{name} {asked[name]}: one of {', '.join(allowed)}")
        if asked["temperature"] < 0:
            found.append(f"--temperature {asked['temperature']}: 0 or more")
        if not 0 < asked["top_p"] <= 1:
            found.append(f"--top-p {asked['top_p']}: more than 0 and at most 1")
        if options.get("control") is not None and not isinstance(self.objective, SsdLm):
            found.append("control steers ssd_lm checkpoints alone")
        if found:
            raise UserError("; ".join(found))
        if self.is_causal:
            asked["steps"] = length
        elif asked["steps"] is None:
            asked["steps"] = own.steps or min(64, length)
        return asked
