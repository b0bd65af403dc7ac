"""Keys and values of the tokens already read, so that decoding reads each token once."""

from __future__ import annotations

from typing import Any

import torch

from neox.errors import ConfigError


class KVCache:
    """Preallocated keys and values of every layer.

    `GPT.forward(tokens, cache=cache)` calls `update` once per layer and `advance` once at its end.

    Args:
        num_layers: blocks of the model.
        capacity: tokens that fit, prompt and generated ones.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity = capacity
        self.length = 0  # tokens stored in every layer
        self.decoders: dict[int, Any] = {}  # by layer: what neox.model.decode has made for this cache
        self._keys: list[torch.Tensor | None] = [None] * num_layers  # each [b, capacity, g, d]
        self._values: list[torch.Tensor | None] = [None] * num_layers

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
        if self._keys[layer] is None:
            shape = (k.shape[0], self.capacity, *k.shape[2:])
            self._keys[layer] = torch.empty(shape, dtype=k.dtype, device=k.device)
            self._values[layer] = torch.empty(shape, dtype=v.dtype, device=v.device)
        end = self.length + k.shape[1]
        keys, values = self.buffers(layer, k.shape[1])
        keys.narrow(1, self.length, end - self.length).copy_(k)  # cheaper than indexing, and decoding does this for one token at a time
        values.narrow(1, self.length, end - self.length).copy_(v)
        return keys.narrow(1, 0, end), values.narrow(1, 0, end)

    def buffers(self, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers [b, capacity, g, d] of a layer that has been updated before, for `tokens` more to be written to `length` and on.

        Raises:
            ConfigError: more tokens than the capacity.
        """
        if (end := self.length + tokens) > self.capacity:
            raise ConfigError(
                "key-value cache is full", where="KVCache", got=f"{end} tokens", want=f"<= {self.capacity}", do="make a cache with a larger capacity"
            )
        return self._keys[layer], self._values[layer]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as stored, after every layer was updated with them."""
        self.length += tokens
