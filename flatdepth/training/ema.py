"""An exponential moving average of the trained weights.

After update ``t`` (counted from 1) the average is

    a_t = d_t * a_(t-1) + (1 - d_t) * w_t        d_t = min(decay, t / (t + 9))

and ``a_0`` the weights that training starts from. ``d_t`` is the warm-up: 1/10 at the first update,
1/2 at the ninth, 0.99 at the 891st, so that the start is forgotten soon however large ``decay`` is
(``t / (t + 9)`` is the (1 + n) / (10 + n) of TensorFlow's ExponentialMovingAverage, whose updates
count from n = 0).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The average of a model's trainable parameters, on their device and in their dtype.

    With ``decay`` 0 there is no average: nothing is kept, and ``applied`` changes nothing.

    Args:
        model: on its final device, with the weights that training starts from. Parameters that do
            not train keep their value and take no part.
        decay: 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {n: p for n, p in model.named_parameters() if p.requires_grad and decay > 0}
        self._average = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after an optimiser step.

        Args:
            updates: optimiser steps that changed the weights so far, this one included.
        """
        if not self._live:
            return
        decay = min(self._decay, updates / (updates + 9))
        average = list(self._average.values())
        torch._foreach_lerp_(average, [p.detach() for p in self._live.values()], 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averaged weights; afterwards its own again, bit for bit.

        The storages change places, so nothing is copied. The model must not be trained within.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name, not copied."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over an average of the same parameters.

        Raises:
            KeyError: a parameter is missing.
        """
        for name, tensor in self._average.items():
            tensor.copy_(state[name])

    def _swap(self) -> None:
        for name, parameter in self._live.items():
            parameter.data, self._average[name] = self._average[name], parameter.data
