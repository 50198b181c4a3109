"""A checkpoint together with its tokenizer: `load(path)` gives a TextModel that samples, infills and scores text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dlm_ray.checkpoint import commit, huggingface, weights
from dlm_ray.config.errors import UserError
from dlm_ray.data.index import load_index
from dlm_ray.data.reading import read_split
from dlm_ray.data.tokenizer import TokenizerIdentity, identity, load_tokenizer
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.denoiser import Objective
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.diffusion.objectives import Autoregressive, Masked
from dlm_ray.diffusion.samplers.rules import Ancestral, Canvas, Confidence, LeftToRight, Rule
from dlm_ray.diffusion.samplers.whole_canvas import Sampled, sample
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser

RULES = ("confidence", "ancestral")
OnStep = Callable[[int, int, Canvas], None]


@dataclass(frozen=True)
class Scored:
    """What a model makes of held-out text, document by document, so that two models can be compared in pairs."""

    nats: np.ndarray
    """[documents] the (bound on the) nats of each."""
    num_bytes: np.ndarray
    """[documents] raw UTF-8 bytes of the scored text."""
    draw_totals: np.ndarray
    """[draws] nats of all documents by each draw alone."""
    num_tokens: int
    is_bound: bool

    @property
    def bits_per_byte(self) -> float:
        """Of all documents together."""
        return likelihood.bits_per_byte(float(self.nats.sum()), float(self.num_bytes.sum()))

    def as_dict(self) -> dict[str, Any]:
        """bits_per_byte with its intervals, and what they are over."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "is_bound": self.is_bound,
            "ci95_documents": likelihood.documents_interval(self.nats, self.num_bytes),
            "ci95_draws": likelihood.draws_interval(self.draw_totals, float(self.num_bytes.sum())),
            "documents": len(self.nats),
            "tokens": self.num_tokens,
            "bytes": int(self.num_bytes.sum()),
            "draws_per_row": len(self.draw_totals),
        }

    def minus(self, other: Scored) -> dict[str, Any]:
        """This model's bits per byte less the other's, with the paired interval over documents."""
        assert (self.num_bytes == other.num_bytes).all(), "a paired comparison needs the same documents"
        difference = self.nats - other.nats
        return {
            "bits_per_byte": likelihood.bits_per_byte(float(difference.sum()), float(self.num_bytes.sum())),
            "ci95_documents_paired": likelihood.documents_interval(difference, self.num_bytes),
        }


class TextModel:
    """A network with its tokenizer, on one device."""

    def __init__(
        self,
        denoiser: HuggingFaceDenoiser,
        tokenizer: Any,
        tokenizer_identity: TokenizerIdentity,
        *,
        is_causal: bool,
        row_tokens: int,
        document_mask: bool,
        pattern: Literal["causal", "bidirectional"] | None = None,
    ):
        self.denoiser = denoiser.eval()
        self.tokenizer, self.tokenizer_identity = tokenizer, tokenizer_identity
        self.is_causal, self.row_tokens, self.document_mask = is_causal, row_tokens, document_mask
        # What it sees follows from what it is; only a base that was never adapted is tried both ways.
        self.pattern: Literal["causal", "bidirectional"] = pattern or ("causal" if is_causal else "bidirectional")
        self.device = next(denoiser.parameters()).device

    def sample(
        self,
        prompt: str = "",
        *,
        num_samples: int = 1,
        length_tokens: int | None = None,
        steps: int | None = None,
        rule: str = "confidence",
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> list[str]:
        """Continuations of `prompt`, each cut at its end-of-text token.

        Args:
            prompt: kept as it is, and not part of what is returned.
            num_samples: sampled in one batch.
            length_tokens: tokens to write; as many as the trained row has room for if None.
            steps: denoising steps; 64 or the length, whichever is less, if None. An autoregressive model takes one a token.
            rule: `confidence` or `ancestral`; an autoregressive model writes left to right and has no rule.
            temperature: 0 takes the most probable token.
            top_p: nucleus.
            seed: the same seed gives the same text, whatever else is in the batch.
            on_step: called with (steps done, steps, canvas).

        Raises:
            UserError: if prompt and length do not fit the context, or an argument is out of range.
        """
        before = self._encode(prompt)
        length = self.row_tokens - 1 - len(before) if length_tokens is None else length_tokens
        self._check_room(length, len(before), "--prompt")
        sampled = self._denoise(before, length, [], num_samples, steps, rule, temperature, top_p, seed, on_step)
        start = 1 + len(before)
        return [self._text(row[start : start + length].tolist()) for row in sampled.ids]

    def infill(
        self,
        prefix: str,
        suffix: str,
        *,
        length_tokens: int,
        num_samples: int = 1,
        steps: int | None = None,
        rule: str = "confidence",
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> list[str]:
        """Texts of `length_tokens` tokens between `prefix` and `suffix`; neither side is part of what is returned.

        Raises:
            UserError: if the model is autoregressive, or the three do not fit the context.
        """
        if self.is_causal:
            raise UserError("this checkpoint is autoregressive: it cannot infill (--prefix, --suffix); use --prompt, or adapt it first")
        before, after = self._encode(prefix), self._encode(suffix)
        self._check_room(length_tokens, len(before) + len(after), "--prefix and --suffix")
        sampled = self._denoise(before, length_tokens, after, num_samples, steps, rule, temperature, top_p, seed, on_step)
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
            UserError: if the data was made with another tokenizer, or the split is empty.
        """
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

    @property
    def objective(self) -> Objective:
        """What scores text: exact, or the bound (which no schedule changes, only its variance)."""
        return Autoregressive() if self.is_causal else Masked(Polynomial())

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _text(self, ids: list[int]) -> str:
        """The text before the first end-of-text token."""
        end = self.tokenizer_identity.end_id
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    def _check_room(self, length: int, given: int, what: str) -> None:
        if length < 1:
            raise UserError(
                f"--length is {length} tokens with {given} of {what}; the context of {self.row_tokens} needs room for at least 1"
            )
        if 1 + given + length > self.row_tokens:
            raise UserError(
                f"{given} tokens of {what} and --length {length} need {1 + given + length} positions, and the model was trained on rows of "
                f"{self.row_tokens}; shorten either"
            )

    def _denoise(
        self,
        before: list[int],
        length: int,
        after: list[int],
        num_samples: int,
        steps: int | None,
        rule: str,
        temperature: float,
        top_p: float,
        seed: int,
        on_step: OnStep | None,
    ) -> Sampled:
        """Canvases [start] before [length masked] after, denoised."""
        _check_sampling(num_samples, steps, rule, temperature, top_p)
        start_id, end_id = self.tokenizer_identity.start_id, self.tokenizer_identity.end_id
        row = torch.tensor([start_id, *before, *[end_id] * length, *after], device=self.device)
        is_masked = torch.zeros(len(row), dtype=torch.bool, device=self.device)
        is_masked[1 + len(before) : 1 + len(before) + length] = True
        canvas = Canvas(row.repeat(num_samples, 1), is_masked.repeat(num_samples, 1))
        banned = set(range(self.tokenizer_identity.vocab_size, self.denoiser.network.config.vocab_size)) - {self.denoiser.mask_id}
        if after:
            banned.add(end_id)  # a text with a suffix does not end in front of it
        if start_id != end_id:
            banned.add(start_id)
        chosen: Rule
        if self.is_causal:
            chosen, num_steps = LeftToRight(), length
        else:
            num_steps = min(64, length) if steps is None else steps
            chosen = Confidence(Polynomial(), canvas.is_masked.sum(1)) if rule == "confidence" else Ancestral(Polynomial())
        return sample(
            self.denoiser,
            canvas,
            chosen,
            Visibility(self.pattern),
            num_steps=num_steps,
            temperature=temperature,
            top_p=top_p,
            banned_ids=torch.tensor(sorted(banned), device=self.device) if banned else None,
            seed=seed,
            on_step=on_step,
        )


def load(path: str | Path, weights_kind: str | None = None, *, device: str = "auto") -> TextModel:
    """A TextModel from a step directory of ours, a run directory (its last step), a Hugging Face folder or a hub name.

    Args:
        path: the checkpoint.
        weights_kind: `ema`, `raw`, or None: the average if the run kept one.
        device: auto, cpu or cuda.
    """
    on = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    checkpoint = weights.our_checkpoint(str(path))
    if checkpoint is None:
        return _load_huggingface(str(path), weights_kind, on)
    manifest = commit.read_manifest(checkpoint)
    denoiser = _network(manifest.model["config"], manifest.model["mask_id"], manifest.model["shift"], on)
    weights.load_weights(checkpoint, dict(denoiser.network.named_parameters()), weights=weights_kind)
    return TextModel(
        denoiser,
        load_tokenizer(str(Path(checkpoint).parent / "tokenizer")),
        TokenizerIdentity(**manifest.tokenizer),
        is_causal=manifest.model["is_causal"],
        row_tokens=manifest.capabilities["row_tokens"],
        document_mask=manifest.capabilities["document_mask"],
    )


def as_unadapted(base: TextModel, pattern: Literal["causal", "bidirectional"], *, seed: int = 0) -> TextModel:
    """An autoregressive model as the denoiser that adaptation starts from: with a new mask row and the shift, and no training.

    The baseline that says what adaptation itself is worth, seeing only the past (as it was trained to) or everything.
    """
    own = base.denoiser
    fields = own.network.config.to_dict()
    mask_id = fields["vocab_size"]
    denoiser = _network({**fields, "vocab_size": mask_id + 1}, mask_id, True, base.device)
    weights_of = dict(own.network.named_parameters())
    for name, parameter in denoiser.network.named_parameters():
        if name in denoiser.vocabulary_names():
            huggingface.fill_with_extra_row(parameter, weights_of[name], name, seed)
        else:
            parameter.copy_(weights_of[name])
    return TextModel(
        denoiser,
        base.tokenizer,
        base.tokenizer_identity,
        is_causal=False,
        row_tokens=base.row_tokens,
        document_mask=base.document_mask,
        pattern=pattern,
    )


def _load_huggingface(name: str, weights_kind: str | None, device: torch.device) -> TextModel:
    if weights_kind is not None:
        raise UserError(
            f"--weights {weights_kind} chooses between the weights of a checkpoint of ours, and {name} is a Hugging Face folder; leave it out"
        )
    folder = huggingface.resolve_folder(name)
    fields = json.loads((Path(folder) / "config.json").read_text())
    denoiser = _network(fields, fields.get("mask_token_id"), fields.get("shift", True), device)
    huggingface.load_safetensors(folder, dict(denoiser.network.named_parameters()), optional={"lm_head.weight"})
    tokenizer = load_tokenizer(str(folder))
    return TextModel(
        denoiser,
        tokenizer,
        identity(tokenizer),
        is_causal=fields.get("is_causal", True) is not False,
        row_tokens=denoiser.network.config.max_position_embeddings,
        document_mask=True,
    )


def _network(fields: dict[str, Any], mask_id: int | None, shift: bool, device: torch.device) -> HuggingFaceDenoiser:
    denoiser = parallel.build(families.read_config(fields), mask_id, shift)
    parallel.materialize(denoiser, device)
    return denoiser.requires_grad_(False)


def number_documents(parts: Sequence[int], document_ids: np.ndarray) -> np.ndarray:
    """[N, L] numbers of documents over all rows, -1 for padding: the ids in a row count within the row's part."""
    numbers: dict[tuple[int, int], int] = {}
    numbered = np.full(document_ids.shape, -1)
    for row, (part, ids) in enumerate(zip(parts, document_ids, strict=True)):
        for document in np.unique(ids[ids >= 0]):
            numbered[row, ids == document] = numbers.setdefault((part, int(document)), len(numbers))
    return numbered


def _check_sampling(num_samples: int, steps: int | None, rule: str, temperature: float, top_p: float) -> None:
    found = []
    if num_samples < 1:
        found.append(f"--num-samples {num_samples}: at least 1")
    if steps is not None and steps < 1:
        found.append(f"--steps {steps}: at least 1")
    if rule not in RULES:
        found.append(f"--rule {rule}: one of {', '.join(RULES)}")
    if temperature < 0:
        found.append(f"--temperature {temperature}: 0 or more")
    if not 0 < top_p <= 1:
        found.append(f"--top-p {top_p}: more than 0 and at most 1")
    if found:
        raise UserError("; ".join(found))
