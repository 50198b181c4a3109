"""Beginnings of prompts that stay when their request is gone, as a tree of pieces: what begins alike is computed once.

A piece is known by its tokens and by the piece before it, so whatever is found was computed behind the same tokens, by the network of this cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """Some blocks of a beginning."""

    number: int
    pairs: Tensor
    """Keys and values, as `Cache.save` gives them."""
    last_row: Tensor
    """[D]: the hidden row of its last position."""

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        return self.pairs.nbytes + self.last_row.nbytes


class Prefixes:
    """What is kept, the least recently used to go first.

    Args:
        piece_tokens: of every piece, whole blocks.
        capacity_bytes: of all pieces; 0 keeps nothing.
    """

    def __init__(self, piece_tokens: int, capacity_bytes: int):
        self.piece_tokens, self.capacity_bytes = piece_tokens, capacity_bytes
        self.num_bytes = 0
        # The least recently used first; a piece is always used after those behind it, so the first of all has none behind it.
        self._pieces: OrderedDict[tuple[int, tuple[int, ...]], Piece] = OrderedDict()
        self._num_made = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def find(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces that `ids` begins with, as far as they are kept; they are used now."""
        found: list[Piece] = []
        keys = []
        for key in self._keys(ids, found):
            piece = self._pieces.get(key)
            if piece is None:
                break
            keys.append(key)
            found.append(piece)
        for key in reversed(keys):
            self._pieces.move_to_end(key)
        return found

    def keep(self, ids: Sequence[int], make: Callable[[int], tuple[Tensor, Tensor] | None]) -> None:
        """Adds what `ids` begins with and is not kept yet, as far as it is at hand and there is room.

        Args:
            ids: of the beginning.
            make: the pairs and the last row of the piece from this position on; None if they are not at hand.
        """
        self.find(ids)  # what is there already is not what goes
        chain: list[Piece] = []
        for key in self._keys(ids, chain):
            piece = self._pieces.get(key)
            if piece is None:
                made = make(len(chain) * self.piece_tokens)
                if made is None:
                    break
                self._num_made += 1
                piece = Piece(self._num_made, *made)
                if not self._has_room(piece.num_bytes, chain):
                    break
                self._pieces[key] = piece
                self.num_bytes += piece.num_bytes
            chain.append(piece)
        self.find(ids)

    def _keys(self, ids: Sequence[int], chain: list[Piece]) -> Iterable[tuple[int, tuple[int, ...]]]:
        """Of every whole piece of `ids`, in order; `chain` has those before it by then."""
        for start in range(0, len(ids) - self.piece_tokens + 1, self.piece_tokens):
            yield chain[-1].number if chain else 0, tuple(ids[start : start + self.piece_tokens])

    def _has_room(self, num_bytes: int, own: Sequence[Piece]) -> bool:
        """Whether there is room for so much, after others than `own` have gone for it."""
        numbers = {piece.number for piece in own}
        while self.num_bytes + num_bytes > self.capacity_bytes:
            oldest = next(iter(self._pieces.values()), None)
            if oldest is None or oldest.number in numbers:
                return False
            self.num_bytes -= self._pieces.popitem(last=False)[1].num_bytes
        return True
