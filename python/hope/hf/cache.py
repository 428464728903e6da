"""What a model carries from call to call, in the form that `generate` passes around."""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache

from hope.errors import HopeError
from hope.model import ModelState


class HopeCache(Cache):
    """A ModelState and the number of positions that were read to get there, padding included.

    The state of memories does not grow with the text, and holds no keys and values of single
    tokens: it cannot be cropped. Rows of the batch can be picked, repeated and reordered.
    `copy.copy` keeps a place to go on from once more; that and `copy.deepcopy` take no space,
    because no call changes a state.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: ModelState | None = None
        self._length = 0

    def __repr__(self) -> str:
        return f"HopeCache({self._length} positions of {max(0, self.batch_size)} texts)"

    def __deepcopy__(self, memo: dict[int, Any]) -> "HopeCache":
        return copy.copy(self)

    def advance(self, state: ModelState | None, tokens: int) -> None:
        """Takes the state after `tokens` more positions."""
        self.state = state
        self._length += tokens

    # ---- what transformers asks ------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # none

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    @property
    def batch_size(self) -> int:
        """The number of rows; -1 before the first call."""
        leaves = (leaf for leaf in pytree.tree_leaves(self.state) if isinstance(leaf, Tensor))
        first = next(leaves, None)
        return -1 if first is None else len(first)

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # "linear" caches do not know how long the text was; this one does

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        return [False]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    # ---- rows ------------------------------------------------------------------------------------

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows that `indices` [n] int64 name, in that order."""
        self.state = pytree.tree_map_only(
            Tensor, lambda leaf: leaf.index_select(0, indices.to(leaf.device)), self.state
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other."""
        rows = torch.arange(max(0, self.batch_size))
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets all."""
        self.state, self._length = None, 0

    # ---- what a memory cannot do -----------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise HopeError(
                "cache cannot be cropped: a memory does not know what it was before it read a "
                "token. Keep a copy (copy.copy) from before"
            )

    def activate_past_recording(self) -> None:
        raise HopeError("cache cannot be rolled back, which assisted decoding needs")

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise HopeError("cache holds the state of a hope model: it takes no keys and values")
