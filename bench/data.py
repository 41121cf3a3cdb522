"""The parts of every case: a shape, its data, and what an implementation gives to the harness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a case."""

    name: str
    n: int
    """tokens"""
    d_in: int
    d_sae: int
    k: int
    T: int
    """positions a window; n is a multiple of it"""
    heads: int
    d_head: int
    d_value: int
    d_memory: int = 256
    planted: bool = False
    """whether each token is the sum of k decoder rows and a little noise, so that no two features tie for the k-th
    place"""

    @property
    def windows(self) -> int:
        return self.n // self.T

    def as_json(self) -> dict[str, int | str]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "planted"}


SHAPES = {
    shape.name: shape
    for shape in (
        # On a CPU all cases of this shape, with the peers, take a few minutes.
        Shape("small", 512, 256, 8192, 32, T=128, heads=8, d_head=32, d_value=64),
        Shape("cpu", 2048, 576, 18432, 32, T=256, heads=8, d_head=32, d_value=64),
        Shape("A", 8192, 768, 32768, 32, T=1024, heads=8, d_head=64, d_value=64),
        Shape("B", 8192, 2304, 65536, 64, T=1024, heads=8, d_head=64, d_value=64),
        Shape("C", 8192, 4096, 131072, 64, T=1024, heads=8, d_head=64, d_value=64),
    )
}
# The shape at which every implementation is compared with the float64 reference before it is timed.
CHECK = Shape("check", 256, 512, 512, 4, T=128, heads=2, d_head=16, d_value=16, planted=True)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Skip(Exception):
    """An implementation can't run here; the message says why."""


class Built(NamedTuple):
    """An implementation, ready to run on some data."""

    run: Callable[[], object]
    """what is timed"""
    outputs: Callable[[], dict[str, Tensor]]
    """runs it once, the first time, and gives the tensors to compare with other implementations; empty for none"""
    parameters: Sequence[Tensor] = ()
    """parameters whose gradients are dropped before memory is measured, so that new ones count"""


class Data:
    """The inputs of a case: activations, weights of an SAE, queries, keys, values. Each is made when first read.

    All are in `dtype`. A training step widens them to float32 for its master weights.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    @cached_property
    def W_dec(self) -> Tensor:
        """[d_sae, d_in], unit rows"""
        return torch.nn.functional.normalize(self._normal(1, self.shape.d_sae, self.shape.d_in).float()).to(self.dtype)

    @cached_property
    def W_enc(self) -> Tensor:
        """[d_sae, d_in], equal to W_dec, as at the start of training (Gao et al. 2024)"""
        return self.W_dec.clone()

    @cached_property
    def b_enc(self) -> Tensor:
        """[d_sae]"""
        return 0.01 * self._normal(2, self.shape.d_sae)

    @cached_property
    def x(self) -> Tensor:
        """[n, d_in]"""
        shape = self.shape
        if not shape.planted:
            return self._normal(3, shape.n, shape.d_in)
        generator = torch.Generator(self.device).manual_seed(3)
        scores = torch.rand(shape.n, shape.d_sae, generator=generator, device=self.device)
        features = scores.topk(shape.k).indices
        # Far enough apart that bfloat16 keeps their order.
        size = torch.linspace(6, 8, shape.k, device=self.device)
        planted = (self.W_dec.float()[features] * size[:, None]).sum(dim=1)
        return (planted + 0.02 * self._normal(4, shape.n, shape.d_in).float()).to(self.dtype)

    @cached_property
    def grad(self) -> Tensor:
        """[n, d_in]: the gradient of the reconstruction"""
        return self._normal(5, self.shape.n, self.shape.d_in)

    @cached_property
    def code(self) -> tuple[Tensor, Tensor]:
        """values [n, k], indices [n, k]: the k largest pre-activations"""
        found = [(rows @ self.W_enc.T + self.b_enc).topk(self.shape.k) for rows in self.x.split(1024)]
        return torch.cat([part.values.relu() for part in found]), torch.cat([part.indices for part in found])

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, H, d_head], v [B, T, H, d_value]"""
        shape = self.shape
        sizes = (shape.d_head, shape.d_head, shape.d_value)
        q, k, v = (self._normal(6 + i, shape.windows, shape.T, shape.heads, size) for i, size in enumerate(sizes))
        return q, k, v

    @cached_property
    def slope(self) -> Tensor:
        """[H]"""
        return torch.linspace(0, 1, self.shape.heads, device=self.device).to(self.dtype)

    @cached_property
    def null(self) -> Tensor:
        """[H]"""
        return self._normal(9, self.shape.heads)

    @cached_property
    def grad_look_back(self) -> Tensor:
        """[B, T, H, d_value]"""
        return self._normal(10, self.shape.windows, self.shape.T, self.shape.heads, self.shape.d_value)

    @cached_property
    def look_back(self) -> dict[str, Tensor]:
        """The parameters of a look-back by name, scaled as those of a new `csae.ContextualSAE`."""
        shape = self.shape
        keys, values = shape.heads * shape.d_head, shape.heads * shape.d_value
        return {
            "W_Q": self._normal(11, keys, shape.d_in) * shape.d_in**-0.5,
            "W_mem": self._normal(12, shape.d_sae, shape.d_memory) * shape.d_in**-0.5,
            "W_K": self._normal(14, keys, shape.d_memory) * shape.d_memory**-0.5,
            "W_V": self._normal(15, values, shape.d_memory) * shape.d_memory**-0.5,
            "W_O": self._normal(13, shape.d_in, values) * 0.1 * values**-0.5,
            "gain": torch.ones(shape.heads, device=self.device).to(self.dtype),
            "slope": self.slope,
            "null": self.null,
        }

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The parameters of a TopK SAE, by name."""
        b_dec = torch.zeros(self.shape.d_in, dtype=self.dtype, device=self.device)
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": b_dec}

    @property
    def autocast(self) -> torch.autocast:
        """The context of a training step: float32 weights, products in `dtype`."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _normal(self, seed: int, *size: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*size, generator=generator, device=self.device).to(self.dtype)
