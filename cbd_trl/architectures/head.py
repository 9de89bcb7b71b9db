"""The output head of a language model as a function of the last hidden state.

Shapes: N positions, D width, V vocabulary rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: softcap(scale x (hidden W^T + bias)).

    Attributes:
        weight_VD: output embedding, (V, D).
        bias_V: (V,), or None.
        scale: multiplies the projection (Cohere, Granite).
        softcap: bounds the logits, softcap x tanh(logits / softcap) (Gemma 2); None for no bound.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def rows(self) -> int:
        """Vocabulary rows V."""
        return self.weight_VD.shape[0]

    def to(self, place: torch.dtype | torch.device) -> "Head":
        """The same head in a dtype or on a device; without a copy where it is so already."""
        bias_V = None if self.bias_V is None else self.bias_V.to(place)
        return Head(self.weight_VD.to(place), bias_V, self.scale, self.softcap)

    def project(self, hidden_ND: Tensor) -> Tensor:
        """The matrix product alone.

        Args:
            hidden_ND: (N, D), in the dtype of the weight.

        Returns:
            (N, V) in that dtype.
        """
        return torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)

    def bound(self, projected_NV: Tensor) -> Tensor:
        """Logits from what `project` returned, in float32 whatever the dtype of the product.

        Args:
            projected_NV: (N, V).

        Returns:
            (N, V) float32.
        """
        logits_NV = projected_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits of hidden states.

        Args:
            hidden_ND: (N, D), any float dtype.

        Returns:
            (N, V) float32.
        """
        return self.bound(self.to(hidden_ND.dtype).project(hidden_ND))


def product_dtype(head: Head, device: torch.device) -> torch.dtype:
    """The dtype in which hidden states are multiplied by a head: autocast's where it is on, else the head's own."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return head.weight_VD.dtype
