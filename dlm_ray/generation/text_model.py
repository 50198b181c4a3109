"""A network with its tokenizer: samples, infills and scores text. `dlm_ray.load(path)` gives one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Unpack

import numpy as np
import torch

from dlm_ray.config.errors import UserError
from dlm_ray.config.objective import Sampling, rules_of
from dlm_ray.data.chat import encode_chat
from dlm_ray.data.index import load_index
from dlm_ray.data.reading import check_ids, read_split
from dlm_ray.data.tokenizer import TokenizerIdentity, encode_text
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.diffusion.samplers.adjust import banned, chained, forced
from dlm_ray.diffusion.samplers.blocks import write
from dlm_ray.diffusion.samplers.requests import LOWEST_ENTROPY_NATS, Request, StoppedBy, Stops
from dlm_ray.diffusion.samplers.rules import (
    Ancestral,
    Canvas,
    Confidence,
    EntropyBounded,
    Factor,
    FirstHitting,
    LeftToRight,
    Rule,
    SelectionRule,
    StateDependent,
    Threshold,
    Tweedie,
)
from dlm_ray.diffusion.samplers.simplex import sample_blocks
from dlm_ray.diffusion.samplers.whole_canvas import SamplingTarget as Denoised
from dlm_ray.diffusion.samplers.whole_canvas import sample
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.generation.sampling import ResolvedSampling, SamplingOptions, SamplingTarget, resolve_sampling
from dlm_ray.generation.scoring import Scored, number_documents
from dlm_ray.models.denoiser import HuggingFaceDenoiser


class Texts(list[str]):
    """What was written, and what it cost."""

    def __init__(self, texts: Iterable[str], network_calls: dict[str, int], stopped_by: Sequence[StoppedBy]):
        super().__init__(texts)
        self.network_calls = network_calls
        """Of the whole batch: `denoising`, and those for the `cache` alone (prompts, finished blocks)."""
        self.stopped_by = list(stopped_by)
        """Of each text: `length`, or the rule of `stop` that ended it."""


class TextModel:
    """A network with its tokenizer, on one device."""

    def __init__(
        self,
        denoiser: HuggingFaceDenoiser,
        tokenizer: Any,
        tokenizer_identity: TokenizerIdentity,
        *,
        objective: Any,
        sequence_length: int,
        document_mask: bool,
        rules: tuple[str, ...] | None = None,
        sampling: Sampling | None = None,
        pattern: Literal["causal", "bidirectional"] | None = None,
    ):
        self.denoiser = denoiser.eval()
        self.tokenizer, self.tokenizer_identity = tokenizer, tokenizer_identity
        self.objective, self.is_causal = objective, bool(objective.is_causal)
        # Of whole blocks: a network of more positions than its blocks fill uses the rest for nothing.
        size = likelihood.block_tokens_of(objective)
        self.sequence_length, self.document_mask = sequence_length // size * size or sequence_length, document_mask
        self.rules = rules or rules_of("autoregressive" if self.is_causal else "masked")
        self.sampling = sampling or Sampling()
        # What it sees follows from what it is; only a base that was never adapted is tried both ways.
        self.pattern: Literal["causal", "bidirectional"] = pattern or ("causal" if self.is_causal else "bidirectional")
        self.device = next(denoiser.parameters()).device

    def sample(
        self, prompt: str = "", *, length_tokens: int | None = None, **options: Unpack[SamplingOptions]
    ) -> Texts:
        """Continuations of `prompt`, each cut at its end-of-text token.

        An autoregressive or block model goes on beyond its context, of which it then remembers the last half.

        Args:
            prompt: kept as it is, and not part of what is returned.
            length_tokens: tokens to write; as many as the trained row has room for if None.
            options: `SamplingOptions`.

        Raises:
            UserError: if prompt and length do not fit the context, or an option is out of range or does not belong to the objective.
        """
        before = self.encode(prompt)
        room = self.sequence_length - 1 - len(before)
        if self.objective.canvas == "simplex":
            room -= room % self.objective.block_tokens  # the network sees whole blocks
        length = room if length_tokens is None else length_tokens
        chosen = resolve_sampling(options, self.sampled_as(), max(1, length))
        self._check_room(length, len(before), room, "--prompt", is_bounded=chosen.block_tokens is None or room < 1)
        return self._write(chosen, before, length, [], options)

    def infill(self, prefix: str, suffix: str, *, length_tokens: int, **options: Unpack[SamplingOptions]) -> Texts:
        """Texts of `length_tokens` tokens between `prefix` and `suffix`; neither side is part of what is returned.

        Raises:
            UserError: if the model cannot see a suffix, or the three do not fit the context.
        """
        own = self.sampled_as()
        kind = {
            "autoregressive": "autoregressive",
            "simplex": "an SSD-LM, which sees nothing behind its block",
            "block": f"of blocks of {own.block_tokens} tokens, which see nothing behind themselves",
        }
        if own.kind != "whole":
            raise UserError(
                f"this checkpoint is {kind[own.kind]}: it cannot infill (--prefix, --suffix); use --prompt, or adapt it first"
            )
        if options.get("block_tokens") not in (None, self.sequence_length):
            raise UserError(f"--block-tokens {options['block_tokens']}: a block sees no suffix; leave it out to infill")
        before, after = self.encode(prefix), self.encode(suffix)
        given = len(before) + len(after)
        self._check_room(length_tokens, given, self.sequence_length - 1 - given, "--prefix and --suffix")
        return self._write(resolve_sampling(options, own, length_tokens), before, length_tokens, after, options)

    def bits_per_byte(
        self,
        data: str,
        *,
        split: str = "held_out",
        max_sequences: int | None = None,
        draws_per_sequence: int = 16,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Bits per byte of a split of a data folder: exact for an autoregressive model, an upper bound for a diffusion model.

        Returns:
            bits_per_byte, is_bound, ci95_documents (bootstrap; None if there is one document), ci95_draws (given these rows; None if exact), and the
            counts.
        """
        return self.score(
            data, split=split, max_sequences=max_sequences, draws_per_sequence=draws_per_sequence, seed=seed
        ).as_dict()

    def score(
        self,
        data: str,
        *,
        split: str = "held_out",
        max_sequences: int | None = None,
        draws_per_sequence: int = 16,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Scored:
        """The same document by document.

        Warns if rows are padded because they are not a whole number of the checkpoint's blocks, or are longer than those it was trained on.

        Raises:
            UserError: if the data was made with another tokenizer, its rows are longer than the network has positions, the split is empty, the
                objective bounds no likelihood, or there is no row or draw to score.
        """
        for key, value in {"draws": draws_per_sequence, "max-sequences": max_sequences}.items():
            if value is not None and value < 1:
                raise UserError(f"--{key} {value}: at least 1")
        if self.objective.likelihood == "none":
            raise UserError(
                "this checkpoint's objective (ssd_lm) gives no bound of the likelihood: there are no bits per byte to report"
            )
        index = load_index(data)
        if difference := index.tokenizer.differs_from(self.tokenizer_identity):
            raise UserError(
                f"{data} was made with {difference} as the checkpoint; build the data with the checkpoint's tokenizer"
            )
        self._check_rows(data, index.sequence_length)
        rows = read_split(data, split, max_sequences)
        if not rows:
            raise UserError(
                f"split {split!r} of {data} has no rows; build it with a larger --held-out, or name another --split"
            )
        check_ids(rows, self.denoiser.mask_id, self.denoiser.vocab_size)
        x_0 = np.stack([row.input_ids for row in rows]).astype(np.int64)
        document_ids = np.stack([row.document_ids for row in rows])
        scored = likelihood.token_nats(
            self.denoiser,
            self.objective,
            x_0,
            document_ids,
            lambda ids: Visibility(self.pattern, document_ids=documents_apart(ids, self.document_mask, self.device)),
            self.device,
            num_draws=draws_per_sequence,
            seed=seed,
            progress=progress,
        )
        documents = number_documents([row.part for row in rows], document_ids)
        num_bytes = likelihood.by_document(np.stack([row.num_bytes for row in rows]).astype(np.float64), documents)
        nats = likelihood.by_document(scored.nats, documents)
        return Scored(
            nats,
            num_bytes,
            scored.draw_totals,
            int(maskable_positions(document_ids).sum()),
            self.objective.likelihood == "bound",
        )

    def _check_rows(self, data: str, sequence_length: int) -> None:
        """Say if the rows of `data` are not scored as the checkpoint was trained; raise UserError if they cannot be."""
        padding, positions = (
            likelihood.num_padding(self.objective, sequence_length),
            self.denoiser.network.config.max_position_embeddings,
        )
        if sequence_length + padding > positions:
            raise UserError(
                f"{data} has rows of {sequence_length} tokens, scored in {sequence_length + padding} positions, and the network has {positions}; build the data "
                "with smaller --sequence-length"
            )
        if padding:
            warnings.warn(
                f"{data} has rows of {sequence_length} tokens, which are not a whole number of this checkpoint's blocks of {self.objective.block_tokens}: "
                f"each is scored with {padding} tokens of padding behind it, which no other token sees",
                stacklevel=3,
            )
        if sequence_length > self.sequence_length:
            warnings.warn(
                f"{data} has rows of {sequence_length} tokens, and the checkpoint was trained on rows of {self.sequence_length}: it never saw the positions "
                "behind them",
                stacklevel=3,
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without a start token; special tokens that it spells out are text (`data.special_tokens`).

        Raises:
            UserError: if the tokenizer cannot encode it without a control token, or it holds the mask token.
        """
        ids = encode_text(self.tokenizer, text)
        self.check_unmasked(ids)
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of messages in the tokenizer's chat template, up to where the answer begins, without a start token.

        Raises:
            UserError: as `encode`.
            Exception: whatever the template raises.
        """
        ids = encode_chat(self.tokenizer, messages, self.tokenizer_identity.start_id)
        self.check_unmasked(ids)
        return ids

    def prompt_ids(self, ids: Sequence[int]) -> list[int]:
        """Return ids behind exactly one start token, whether they begin with one or not."""
        start = self.tokenizer_identity.start_id
        first = next((place for place, token in enumerate(ids) if token != start), len(ids))
        return [start, *ids[first:]]

    def check_unmasked(self, ids: Sequence[int]) -> None:
        """Raises UserError if ids that are given hold the mask token, which stands for what is to be written."""
        mask_id = self.denoiser.mask_id
        if mask_id is not None and mask_id in ids:
            raise UserError(
                f"token {ids.index(mask_id)} is the mask token (id {mask_id}), which no text may hold; take it out"
            )

    def _text(self, ids: list[int]) -> str:
        """The text before the first end-of-text token."""
        end = self.tokenizer_identity.end_id
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    def _check_room(self, length: int, given: int, room: int, what: str, is_bounded: bool = True) -> None:
        if length < 1:
            raise UserError(
                f"--length is {length} tokens with {given} of {what}; the context of {self.sequence_length} needs room for at least 1"
            )
        if is_bounded and length > room:
            raise UserError(
                f"{given} tokens of {what} and --length {length} need {1 + given + length} positions, and the model was trained on rows of "
                f"{self.sequence_length}, which leaves {max(0, room)}; shorten either"
            )

    def sampled_as(self) -> SamplingTarget:
        """What it is, for a sampler."""
        trained = 1 if self.is_causal else getattr(self.objective, "block_tokens", None)
        if self.objective.canvas == "simplex":
            return SamplingTarget("simplex", self.rules, self.sampling, self.sequence_length, None)
        if trained is None or trained >= self.sequence_length:
            return SamplingTarget("whole", self.rules, self.sampling, self.sequence_length, None)
        return SamplingTarget(
            "autoregressive" if self.is_causal else "block", self.rules, self.sampling, self.sequence_length, trained
        )

    def _write(
        self, chosen: ResolvedSampling, before: list[int], length: int, after: list[int], options: SamplingOptions
    ) -> Texts:
        """[start] before [length to write] after, in a batch."""
        prompt = self.prompt_ids(before)
        never = self.forbidden_token_ids(bool(after), options.get("ban") or ())
        common: dict[str, Any] = {
            "num_steps": chosen.steps,
            "temperature": chosen.temperature,
            "top_p": chosen.top_p,
            "on_step": options.get("on_step"),
        }
        if self.objective.canvas == "simplex":
            common |= {"seed": options.get("seed", 0), "control_weight": options.get("control_weight", 0.0)}
            common |= {
                "banned_ids": torch.tensor(never, dtype=torch.long, device=self.device),
                "control": options.get("control"),
            }
            canvas = self._canvas(prompt, length, after, chosen.num_samples)
            projection: Any = chosen.rule
            return self._texts(
                sample_blocks(self.denoiser, self.objective, canvas, projection=projection, **common),
                len(prompt),
                length,
            )
        forced_ids = self._forced(options.get("force") or {}, len(prompt), length)
        common |= {"grid": chosen.grid}
        common |= {
            "adjust": chained(
                banned(never) if never else None, options.get("adjust"), forced(forced_ids) if forced_ids else None
            )
        }
        rule = self.rule(chosen)
        if chosen.block_tokens is None:
            canvas = self._canvas(prompt, length, after, chosen.num_samples)
            common |= {"noise": chosen.noise, "seed": options.get("seed", 0)}
            return self._texts(
                sample(self.denoiser, canvas, rule, Visibility(self.pattern), **common), len(prompt), length
            )
        assert isinstance(rule, SelectionRule), "other rules are refused by `choose`"
        requests = [self._request(prompt, length, number, options) for number in range(chosen.num_samples)]
        blocks = write(
            self.denoiser,
            requests,
            rule,
            block_tokens=chosen.block_tokens,
            context_tokens=self.sequence_length,
            **common,
        )
        calls = {"denoising": blocks.num_denoising_calls, "cache": blocks.num_cache_calls}
        return Texts((self._text(text.ids) for text in blocks.texts), calls, [text.stopped_by for text in blocks.texts])

    def _canvas(self, prompt: list[int], length: int, after: list[int], num_rows: int) -> Canvas:
        row = torch.tensor([*prompt, *[self.tokenizer_identity.end_id] * length, *after], device=self.device)
        is_masked = torch.zeros(len(row), dtype=torch.bool, device=self.device)
        is_masked[len(prompt) : len(prompt) + length] = True
        return Canvas(row.repeat(num_rows, 1), is_masked.repeat(num_rows, 1))

    def _texts(self, done: Denoised, start: int, length: int) -> Texts:
        texts = [self._text(row[start : start + length].tolist()) for row in done.ids]
        return Texts(texts, {"denoising": done.num_network_calls, "cache": 0}, ["length"] * len(texts))

    def _request(self, prompt: list[int], length: int, number: int, options: SamplingOptions) -> Request:
        asked, reward = options.get("stop") or (), options.get("reward")
        return Request(
            prompt,
            length,
            number,
            options.get("seed", 0),
            Stops(
                self.tokenizer_identity.end_id if "end" in asked else None,
                LOWEST_ENTROPY_NATS if "entropy" in asked else None,
            ),
            candidates=options.get("candidates", 1),
            reward=None if reward is None else lambda ids: reward(self.tokenizer.decode(ids[1:])),
            reward_temperature=options.get("reward_temperature", 1.0),
        )

    def forbidden_token_ids(self, has_suffix: bool, ban: Sequence[str]) -> list[int]:
        """Ids that are never drawn: rows without a token, the start token, before a suffix the end token, and what is banned."""
        start_id, end_id = self.tokenizer_identity.start_id, self.tokenizer_identity.end_id
        never = set(range(self.tokenizer_identity.vocab_size, self.denoiser.vocab_size))
        if has_suffix:
            never.add(end_id)  # a text with a suffix does not end in front of it
        if start_id != end_id:
            never.add(start_id)
        for text in ban:
            ids = self.encode(text)
            if len(ids) != 1:
                raise UserError(
                    f"--ban {text!r} is {len(ids)} tokens of this tokenizer, and one token at a time can be banned; name one token"
                )
            never.update(ids)
        return sorted(never)

    def _forced(self, force: Mapping[int, str], start: int, length: int) -> dict[int, int]:
        """Absolute position -> token, of texts by their place behind the prompt."""
        tokens: dict[int, int] = {}
        for place, text in force.items():
            for position, token in enumerate(self.encode(text), start=place):
                if not 0 <= position < length:
                    raise UserError(
                        f"--force {place}={text}: token {position} is not among the {length} that are written, 0 to {length - 1}"
                    )
                if tokens.setdefault(start + position, token) != token:
                    raise UserError(
                        f"--force {place}={text}: another text is forced to stand at token {position}, too; move either"
                    )
        return tokens

    def rule(self, chosen: ResolvedSampling) -> Rule:
        """What a step reveals."""
        name = chosen.rule
        if name == "state_dependent":
            return StateDependent(self.objective.exponents)
        rules: dict[str, Rule] = {
            "confidence": Confidence(Polynomial()),
            "margin": Confidence(Polynomial(), "margin"),
            "ancestral": Ancestral(Polynomial(), joint=chosen.noise == "float32_gumbel", remask=chosen.remask),
            "first_hitting": FirstHitting(),
            "threshold": Threshold(chosen.threshold),
            "factor": Factor(chosen.factor),
            "entropy_bounded": EntropyBounded(chosen.entropy_bound),
            "tweedie": Tweedie(Polynomial(), self.denoiser.vocab_size),
            "left_to_right": LeftToRight(),
        }
        return rules[name]
