"""Keys and values of the tokens read so far, so that decoding computes each token once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from neox.errors import ConfigError

Decoder = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class KVCache:
    """Preallocated keys and values of every layer.

    `model(tokens, cache=cache)` calls `update` once per layer and `advance` once at its end.

    Args:
        capacity: tokens that fit, of prompt and continuation together.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0  # tokens stored in every layer
        self.decoders: dict[int, Decoder | None] = {}  # by layer, of neox.model.decode; None: unsupported
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: keys, values [b, capacity, g, d]

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's new keys and values and return all of them.

        Args:
            layer: number of the block, from 0.
            k: [b, s, g, d], rotated.
            v: [b, s, g, d].

        Returns:
            keys and values [b, length + s, g, d], views into the cache.

        Raises:
            ConfigError: more tokens than the capacity.
        """
        if layer not in self._buffers:
            shape = (k.shape[0], self.capacity, *k.shape[2:])
            self._buffers[layer] = (
                torch.empty(shape, dtype=k.dtype, device=k.device),
                torch.empty(shape, dtype=v.dtype, device=v.device),
            )
        end = self.length + k.shape[1]
        keys, values = self.buffers(layer, k.shape[1])
        # narrow is cheaper than indexing, and decoding comes here for every token
        keys.narrow(1, self.length, end - self.length).copy_(k)
        values.narrow(1, self.length, end - self.length).copy_(v)
        return keys.narrow(1, 0, end), values.narrow(1, 0, end)

    def buffers(self, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [b, capacity, g, d] of a layer that has been updated before, with room for `tokens` more.

        The caller writes them from position `length` on.

        Raises:
            ConfigError: more tokens than the capacity.
        """
        if (end := self.length + tokens) > self.capacity:
            raise ConfigError(
                "key-value cache is full",
                where="KVCache",
                got=f"{end} tokens",
                want=f"<= {self.capacity}",
                do="make a cache with a larger capacity",
            )
        return self._buffers[layer]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as stored, after every layer has been updated with them."""
        self.length += tokens
