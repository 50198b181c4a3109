"""The identity of a tokenizer, which links data and checkpoints; a reader of shards needs no more of a tokenizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import cast

from dlm_ray.config.manifest_fields import TokenizerFields


@dataclass(frozen=True)
class TokenizerIdentity:
    """The identity of a tokenizer: equal content has an equal sha256, independent of its location and name."""

    name: str
    sha256: str
    vocab_size: int
    """Number of ids, including added tokens; every id is smaller."""
    start_id: int
    """The token that begins every segment: beginning-of-text, or end-of-text for tokenizers without one."""
    end_id: int

    def differs_from(self, other: TokenizerIdentity) -> str:
        """Return the difference for a message; empty if all ids, the start and the end token mean the same."""
        if self.sha256 != other.sha256:
            return f"tokenizer {self.name} (sha256 {self.sha256[:12]}) and not {other.name} ({other.sha256[:12]})"
        if (self.start_id, self.end_id) != (other.start_id, other.end_id):
            return (
                f"start token {self.start_id} and end token {self.end_id}, and not {other.start_id} and {other.end_id}"
            )
        return ""

    def as_dict(self) -> TokenizerFields:
        """Return the identity as an index or a manifest holds it."""
        return cast("TokenizerFields", asdict(self))
