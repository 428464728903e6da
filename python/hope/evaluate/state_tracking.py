"""State tracking: counting modulo 2 (parity) and modulo 5, also for longer than in training."""

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from hope.evaluate.task import IGNORED, Task

_MODULI = (2, 5)
_ANSWER = 2 + len(_MODULI)  # the token of count 0: after the two bits and the moduli's marks


class StateTracking(Task):
    """A mark that names the modulus, then bits; asked at every bit: the count of ones, modulo it.

    Training texts have 8, 16 or 32 bits. The model is judged by its answer at the last of 32, 64
    and 128 bits: a state that is kept is as right there, which shows who only counts what is in
    sight. Guessing scores 1/2 and 1/5.
    """

    name = "state-tracking"
    title = "counting modulo 2 and 5"
    description = "the share of right answers at the end, by modulus and number of bits"
    settings: ClassVar[dict[str, dict[str, Any]]] = {
        f"mod {modulus}, {bits} bits": {"modulus": modulus, "bits": bits}
        for modulus in _MODULI
        for bits in (32, 64, 128)
    }
    vocab_size = _ANSWER + max(_MODULI)
    longest = 1 + 32

    def sample(
        self,
        size: int,
        generator: Generator,
        *,
        modulus: int | None = None,
        bits: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`size` sequences and what is asked at their tokens, [size, 1 + bits] int64 each.

        modulus: None draws one for each sequence. bits: given, only the last one is asked about.
        """
        number = 8 << int(torch.randint(3, (), generator=generator)) if bits is None else bits
        if modulus is None:
            which = torch.randint(len(_MODULI), (size, 1), generator=generator)
        else:
            which = torch.full((size, 1), _MODULI.index(modulus))
        ones = torch.randint(2, (size, number), generator=generator)
        tokens = torch.cat((2 + which, ones), 1)
        targets = _ANSWER + ones.cumsum(1) % torch.tensor(_MODULI)[which]
        if bits is not None:
            targets[:, :-1] = IGNORED
        return tokens, torch.cat((torch.full_like(which, IGNORED), targets), 1)
