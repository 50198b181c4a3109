"""A cache of prompt prefixes that outlives requests, as a tree of pieces, so that equal prefixes are computed once.

The key of a piece is its tokens and the piece before it. A piece that is found was therefore computed after the same
tokens, by the network of this cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """The keys and values of some blocks of a prefix."""

    number: int
    """Identifies the piece; unique within the cache."""
    pairs: Tensor
    """Keys and values, as `Cache.save` returns them."""
    last_row: Tensor
    """[D]: the hidden state of its last position."""

    @property
    def num_bytes(self) -> int:
        """The memory that the piece occupies."""
        return self.pairs.nbytes + self.last_row.nbytes


class Prefixes:
    """A cache of pieces that evicts the least recently used one first.

    Args:
        piece_tokens: number of tokens of every piece, a multiple of the block size.
        capacity_bytes: memory for all pieces; 0 keeps none.
    """

    def __init__(self, piece_tokens: int, capacity_bytes: int):
        self.piece_tokens, self.capacity_bytes = piece_tokens, capacity_bytes
        self.num_bytes = 0
        # The least recently used first. A piece is always used after its successors, so the first one has none.
        self._pieces: OrderedDict[tuple[int, tuple[int, ...]], Piece] = OrderedDict()
        self._num_made = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def find(self, ids: Sequence[int]) -> list[Piece]:
        """Return the cached pieces that `ids` begins with, and mark them as used."""
        pieces: list[Piece] = []
        keys = []
        for key in self._keys(ids, pieces):
            piece = self._pieces.get(key)
            if piece is None:
                break
            keys.append(key)
            pieces.append(piece)
        for key in reversed(keys):
            self._pieces.move_to_end(key)
        return pieces

    def keep(self, ids: Sequence[int], make: Callable[[int], tuple[Tensor, Tensor] | None]) -> None:
        """Add the pieces that `ids` begins with and the cache lacks, while they are available and there is room.

        Args:
            ids: token ids of the prompt.
            make: returns the pairs and the last hidden state of the piece that begins at a position, or None if they
                are not available.
        """
        self.find(ids)  # marks the pieces as used, so that they are not evicted for their successors
        chain: list[Piece] = []
        for key in self._keys(ids, chain):
            piece = self._pieces.get(key)
            if piece is None:
                values = make(len(chain) * self.piece_tokens)
                if values is None:
                    break
                self._num_made += 1
                piece = Piece(self._num_made, *values)
                if not self._has_room(piece.num_bytes, chain):
                    break
                self._pieces[key] = piece
                self.num_bytes += piece.num_bytes
            chain.append(piece)
        self.find(ids)

    def _keys(self, ids: Sequence[int], chain: list[Piece]) -> Iterable[tuple[int, tuple[int, ...]]]:
        """Iterate over the keys of the pieces of `ids`; the caller appends each piece to `chain` before the next."""
        for start in range(0, len(ids) - self.piece_tokens + 1, self.piece_tokens):
            yield chain[-1].number if chain else 0, tuple(ids[start : start + self.piece_tokens])

    def _has_room(self, num_bytes: int, chain: Sequence[Piece]) -> bool:
        """Evict pieces outside `chain` until `num_bytes` fit, and return whether they do."""
        numbers = {piece.number for piece in chain}
        while self.num_bytes + num_bytes > self.capacity_bytes:
            oldest = next(iter(self._pieces.values()), None)
            if oldest is None or oldest.number in numbers:
                return False
            self.num_bytes -= self._pieces.popitem(last=False)[1].num_bytes
        return True
