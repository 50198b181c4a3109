"""TextModel: a network with its tokenizer, which samples, infills and scores text; `dlm_ray.load(path)` returns one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Unpack, cast

from dlm_ray.config.errors import UserError
from dlm_ray.config.objective import rules_of
from dlm_ray.config.sampling import ResolvedSampling, Sampling
from dlm_ray.data.chat import encode_chat
from dlm_ray.data.identity import TokenizerIdentity
from dlm_ray.data.tokenizer import FastTokenizer, encode_text
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.denoiser import Objective
from dlm_ray.diffusion.objectives.ssd_lm import SsdLm
from dlm_ray.diffusion.samplers.rules import Rule
from dlm_ray.generation.batches import generate
from dlm_ray.generation.chat import resolve_chat
from dlm_ray.generation.rules import build_rule
from dlm_ray.generation.sampling import SamplingOptions, SamplingTarget, resolve_sampling
from dlm_ray.generation.scoring import Scored, ScoreReport, score_data
from dlm_ray.generation.texts import GeneratedTexts
from dlm_ray.models.denoiser import HuggingFaceDenoiser


class TextModel:
    """A network with its tokenizer, on one device.

    Args:
        denoiser: the network.
        tokenizer: its tokenizer.
        tokenizer_identity: vocabulary size, start and end token.
        objective: scores the text, and decides how it is sampled.
        sequence_length: context length in tokens; rounded down to whole blocks.
        document_mask: whether documents of a sequence see each other only within themselves.
        rules: sampling rules, the default first; by default those of the kind of network.
        sampling: the section `sampling` of the recipe.
        pattern: visibility; by default that of the training.
    """

    def __init__(
        self,
        denoiser: HuggingFaceDenoiser,
        tokenizer: FastTokenizer,
        tokenizer_identity: TokenizerIdentity,
        *,
        objective: Objective,
        sequence_length: int,
        document_mask: bool,
        rules: tuple[str, ...] | None = None,
        sampling: Sampling | None = None,
        pattern: Literal["causal", "bidirectional"] | None = None,
    ):
        self.denoiser = denoiser.eval()
        self.tokenizer, self.tokenizer_identity = tokenizer, tokenizer_identity
        self.objective, self.is_causal = objective, bool(objective.is_causal)
        # Positions after the last whole block are not used.
        size = likelihood.block_tokens_of(objective)
        self.sequence_length, self.document_mask = sequence_length // size * size or sequence_length, document_mask
        self.rules = rules or rules_of("autoregressive" if self.is_causal else "masked")
        self.sampling = sampling or Sampling()
        # Only a base model without adaptation is evaluated with either pattern.
        self.pattern: Literal["causal", "bidirectional"] = pattern or ("causal" if self.is_causal else "bidirectional")
        self.device = next(denoiser.parameters()).device

    def sample(
        self, prompt: str = "", *, length_tokens: int | None = None, **options: Unpack[SamplingOptions]
    ) -> GeneratedTexts:
        """Return continuations of `prompt`, each cut at its end-of-text token.

        An autoregressive or block model continues beyond its context; it then sees the last half of it.

        Args:
            prompt: text to continue; the returned texts do not include it.
            length_tokens: tokens to generate; None fills the context.
            options: `SamplingOptions`.

        Raises:
            UserError: if prompt and length do not fit the context, or an option is out of range or does not belong to
                the objective.
        """
        prompt_ids = self.encode(prompt)
        room = self.sequence_length - 1 - len(prompt_ids)
        if self.objective.canvas == "simplex":
            room -= room % cast(SsdLm, self.objective).block_tokens  # the network sees whole blocks
        length = room if length_tokens is None else length_tokens
        params = resolve_sampling(options, self.sampling_target(), max(1, length))
        is_bounded = params.block_tokens is None or room < 1
        self.check_room(length, len(prompt_ids), room, "`prompt`", is_bounded)
        return generate(self, params, prompt_ids, length, [], options)

    def infill(
        self, prefix: str, suffix: str, *, length_tokens: int, **options: Unpack[SamplingOptions]
    ) -> GeneratedTexts:
        """Return texts of `length_tokens` tokens between `prefix` and `suffix`, without the two.

        Raises:
            UserError: if the model cannot see a suffix, or the three do not fit the context.
        """
        target = self.sampling_target()
        kinds = {
            "autoregressive": "autoregressive",
            "simplex": "an SSD-LM, which sees nothing after its block",
            "block": f"of blocks of {target.block_tokens} tokens, which see nothing after themselves",
        }
        if target.kind != "whole":
            raise UserError(
                f"this checkpoint is {kinds[target.kind]}: it cannot infill (`prefix`, `suffix`); use `prompt`, or "
                "adapt it first"
            )
        size = options.get("block_tokens")
        if size is not None and size != self.sequence_length:
            raise UserError.of("block_tokens", size, "a block sees no suffix", "leave it out to infill")
        prefix_ids, suffix_ids = self.encode(prefix), self.encode(suffix)
        num_given = len(prefix_ids) + len(suffix_ids)
        self.check_room(length_tokens, num_given, self.sequence_length - 1 - num_given, "`prefix` and `suffix`")
        params = resolve_sampling(options, target, length_tokens)
        return generate(self, params, prefix_ids, length_tokens, suffix_ids, options)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        length_tokens: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GeneratedTexts:
        """Return answers to a conversation in the tokenizer's chat template, each cut at its end-of-text token.

        Args:
            messages: one question, or mappings with `role` (system, user, assistant) and `content`.
            length_tokens: most tokens of an answer; None takes 512, or 128 of a model that samples whole texts, which
                denoises all of them.
            options: `SamplingOptions`; temperature is 0 unless it is set, and an answer ends at its end-of-text token.

        Raises:
            UserError: if the tokenizer has no chat template, or as `sample`.
        """
        params, prompt_ids, length, options = resolve_chat(self, messages, length_tokens, options)
        return generate(self, params, prompt_ids, length, [], options)

    def bits_per_byte(
        self,
        data: str,
        *,
        split: str = "held_out",
        max_sequences: int | None = None,
        draws_per_sequence: int = 16,
        seed: int = 0,
    ) -> ScoreReport:
        """Return the bits per byte of a split of a data folder: exact if autoregressive, an upper bound if diffusion.

        Returns:
            bits_per_byte, is_bound, ci95_documents (bootstrap; None if there is one document), ci95_draws (given these
            sequences; None if exact), and the counts.
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
        """Return the nats and bytes of each document of a split of a data folder, as `scoring.score_data`."""
        return score_data(
            self,
            data,
            split=split,
            max_sequences=max_sequences,
            draws_per_sequence=draws_per_sequence,
            seed=seed,
            progress=progress,
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without a start token; a special token spelled out in it is encoded as text.

        Raises:
            UserError: if the tokenizer cannot encode it without a control token, or the ids hold the mask token.
        """
        ids: list[int] = encode_text(self.tokenizer, text)
        self.check_unmasked(ids)
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of messages in the chat template, up to the start of the answer, without a start token.

        Raises:
            UserError: as `encode`.
            Exception: any error of the template.
        """
        ids: list[int] = encode_chat(self.tokenizer, messages, self.tokenizer_identity.start_id)
        self.check_unmasked(ids)
        return ids

    def prompt_ids(self, ids: Sequence[int]) -> list[int]:
        """Return the ids after exactly one start token, whether they begin with start tokens or not."""
        start = self.tokenizer_identity.start_id
        first = next((index for index, token in enumerate(ids) if token != start), len(ids))
        return [start, *ids[first:]]

    def check_unmasked(self, ids: Sequence[int]) -> None:
        """Raise UserError if given ids hold the mask token, which stands for tokens to generate."""
        mask_id = self.denoiser.mask_id
        if mask_id is not None and mask_id in ids:
            raise UserError(
                f"token {ids.index(mask_id)} is the mask token (id {mask_id}), which no text may hold; take it out"
            )

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, in which special tokens are spelled out."""
        return cast(str, self.tokenizer.decode(ids))

    def decode_until_end(self, ids: list[int]) -> str:
        """Return the text before the first end-of-text token."""
        end_id = self.tokenizer_identity.end_id
        return self.decode(ids[: ids.index(end_id)] if end_id in ids else ids)

    def check_room(self, length: int, num_given: int, room: int, names: str, is_bounded: bool = True) -> None:
        """Raise UserError if `length` tokens do not fit next to the given ones, whose parameters are `names`."""
        if length < 1:
            allowed = (
                f"must be at least 1, and {num_given} tokens of {names} in the context of {self.sequence_length} leave "
                f"room for {max(0, room)}"
            )
            raise UserError.of("length_tokens", length, allowed)
        if is_bounded and length > room:
            allowed = (
                f"{num_given} tokens of {names} and these need {1 + num_given + length} positions, and the model was "
                f"trained on sequences of {self.sequence_length}, which leaves {max(0, room)}"
            )
            raise UserError.of("length_tokens", length, allowed, "shorten either")

    def sampling_target(self) -> SamplingTarget:
        """Return the properties that decide how the model is sampled."""
        trained = 1 if self.is_causal else getattr(self.objective, "block_tokens", None)
        kind: Literal["autoregressive", "block", "whole", "simplex"] = "autoregressive" if self.is_causal else "block"
        if self.objective.canvas == "simplex":
            kind, trained = "simplex", None
        elif trained is None or trained >= self.sequence_length:
            kind, trained = "whole", None
        return SamplingTarget(kind, self.rules, self.sampling, self.sequence_length, trained)

    def forbidden_token_ids(self, has_suffix: bool, ban: Sequence[str]) -> list[int]:
        """Return the ids that are never sampled.

        These are ids without a token, the start token, before a suffix the end token, and the texts of `ban`.

        Raises:
            UserError: if a text of `ban` is not exactly one token.
        """
        start_id, end_id = self.tokenizer_identity.start_id, self.tokenizer_identity.end_id
        forbidden_ids = set(range(self.tokenizer_identity.vocab_size, self.denoiser.vocab_size))
        if has_suffix:
            forbidden_ids.add(end_id)  # a text with a suffix does not end before it
        if start_id != end_id:
            forbidden_ids.add(start_id)
        for text in ban:
            ids = self.encode(text)
            if len(ids) != 1:
                allowed = f"must be one token, and this text is {len(ids)} tokens of this tokenizer"
                raise UserError.of("ban", repr(text), allowed)
            forbidden_ids.update(ids)
        return sorted(forbidden_ids)

    def rule(self, params: ResolvedSampling) -> Rule:
        """Return the rule that selects the tokens that a step reveals."""
        return build_rule(params, self.objective, self.denoiser.vocab_size)
