"""Scores of the tokens before a window of last ones, that window behind them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def then_window(before: Float[Tensor, "kv_heads before"], window: int) -> Float[Tensor, "kv_heads tokens"]:
    """Non-negative scores of the tokens before a window, and behind them the window's, for a route that protects it.

    Where protection has shrunk, what is left of the window comes after all others, the latest tokens first.
    """
    order = torch.arange(-window, 0, device=before.device, dtype=before.dtype)
    return torch.cat([before, order.expand(len(before), -1)], 1)
