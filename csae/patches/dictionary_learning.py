"""dictionary_learning's TopK and BatchTopK SAEs on our ops: `csae.patch("dictionary_learning")`.

Replaced are `encode` and `forward` of AutoEncoderTopK and BatchTopKSAE. The trainers,
losses, AuxK, thresholds and counts are the library's own code: `encode` hands them lazy tensors
(`csae.patches.features`). The projection of the decoder's gradient is the library's formula without its einsum, which
takes longer than the rest of a step.

On our ops: AutoEncoderTopK.encode, of which a user gets an ordinary dense tensor, but with return_topk one that is
made when it is read; its forward (of fewer than 128 tokens with the library's decoder); TopKTrainer's step;
BatchTopKTrainer's step, where the largest of each token prove to hold the largest of the batch
(`csae.patches.batch_topk`: no token has more than 8 times k); BatchTopKSAE's encode and forward by its threshold, where
no token has more than 8 times k above it.

The library's own code runs where that proof fails, at the cost of having tried, and for a threshold that is not set
(below zero), AutoEncoderTopK with use_threshold, output_features where a gradient is recorded (one by them may be
wanted), layers with hooks or of another class, torch.compile, torch.func, float64 on CUDA, and MatryoshkaBatchTopKSAE.

What differs: codes come in descending order, where the library's have none. Between equal activations the lower index
wins, where torch.topk takes any: so where fewer than k features of a token are positive, those that fill up its code at
zero, and count as fired, are the largest before the relu. In half precision the selection is made before rounding.
Activations before the top-k (return_topk's last) can't be read once the weights have changed. Second derivatives raise
an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from csae.ops import topk_encode
from csae.ops.topk_encode import with_encode_gradient

from . import Replacement
from .batch_topk import above_threshold, batch_topk
from .features import pre_acts, scattered
from .lazy import plain
from .topk_graph import code_of

PACKAGE = "dictionary-learning"
TESTED = "0.1"


def replacements() -> list[Replacement]:
    """What `csae.patch` puts into the library."""
    from dictionary_learning.trainers import batch_top_k, top_k

    TopK, BatchTopK, BatchTrainer = top_k.AutoEncoderTopK, batch_top_k.BatchTopKSAE, batch_top_k.BatchTopKTrainer
    own_encode, own_forward = TopK.encode, TopK.forward
    own_batch_encode, own_batch_forward = BatchTopK.encode, BatchTopK.forward
    own_update_threshold = BatchTrainer.update_threshold

    def encode(self: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if use_threshold or not _can_encode(self):
            return own_encode(self, x, return_topk, use_threshold)
        weights = x - self.b_dec, _rows(self.encoder.weight), self.encoder.bias
        values, indices = topk_encode(*weights, int(self.k))
        features = scattered(values, indices, self.dict_size)
        return (features, values, indices, pre_acts(*weights)) if return_topk else plain(features)

    def forward(self: Any, x: Tensor, output_features: bool = False) -> Any:
        if type(self).encode is not encode or not _can_encode(self) or (output_features and torch.is_grad_enabled()):
            return own_forward(self, x, output_features)
        features, *_ = self.encode(x, return_topk=True)
        x_hat = self.decode(features)
        return (x_hat, plain(features)) if output_features else x_hat

    def encode_batch(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        found = _batch_code(self, x, use_threshold) if x.dim() == 2 else None
        if found is None:
            return own_batch_encode(self, x, return_active, use_threshold)
        values, indices, weights = found
        features = scattered(values, indices, self.dict_size)
        if not return_active:
            return plain(features)
        active = torch.zeros(self.dict_size, dtype=torch.bool, device=x.device)
        active[indices[values > 0]] = True
        return features, active, pre_acts(*weights)

    def forward_batch(self: Any, x: Tensor, output_features: bool = False) -> Any:
        wanted = output_features and torch.is_grad_enabled()  # a gradient by the features
        found = None if type(self).encode is not encode_batch or wanted else _batch_code(self, x, use_threshold=True)
        if found is None:
            return own_batch_forward(self, x, output_features)
        features = scattered(found[0], found[1], self.dict_size)
        x_hat = self.decode(features)
        return (x_hat, plain(features)) if output_features else x_hat

    def update_threshold(self: Any, f: Tensor) -> None:
        # It takes the least of the positive entries, which are all in the code.
        code = code_of(f)
        own_update_threshold(self, f if code is None else code.values)

    return [
        Replacement(TopK, "encode", encode),
        Replacement(TopK, "forward", forward),
        Replacement(BatchTopK, "encode", encode_batch),
        Replacement(BatchTopK, "forward", forward_batch),
        Replacement(BatchTrainer, "update_threshold", update_threshold),
        Replacement(top_k, "remove_gradient_parallel_to_decoder_directions", _remove_parallel_gradient),
        Replacement(batch_top_k, "remove_gradient_parallel_to_decoder_directions", _remove_parallel_gradient),
    ]


def _batch_code(ae: Any, x: Tensor, use_threshold: bool) -> tuple[Tensor, Tensor, tuple[Tensor, ...]] | None:
    """The code of a BatchTopKSAE, with its gradient, and what made it; None where the library's own code has to."""
    if not _can_encode(ae):
        return None
    weights = x - ae.b_dec, _rows(ae.encoder.weight), ae.encoder.bias
    k = int(ae.k)
    code = above_threshold(*weights, ae.threshold, k) if use_threshold else batch_topk(*weights, k)
    return None if code is None else (with_encode_gradient(*weights, code.values, code.indices), code.indices, weights)


def _can_encode(ae: Any) -> bool:
    """Whether our ops can take its weights, and nothing sees or changes what goes through its layers."""
    weight = ae.encoder.weight
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    too_wide = weight.is_cuda and weight.dtype == torch.float64
    return not traced and not too_wide and _is_plain(ae.encoder) and _is_plain(ae.decoder)


def _is_plain(layer: nn.Module) -> bool:
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    everywhere = (f"_global{name}" for name in hooks)
    hooked = any(getattr(layer, name) for name in hooks) or any(getattr(nn.modules.module, name) for name in everywhere)
    return type(layer) is nn.Linear and not hooked


def _rows(weight: Tensor) -> Tensor:
    """The encoder's weight, whose columns are next to each other in the library, with its rows so."""
    if weight.is_contiguous() or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return _Rows.apply(weight)


class _Rows(torch.autograd.Function):
    """weight.contiguous(), with the gradient in the layout of the weight: autograd's copy into it takes far longer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.T.contiguous().T


@torch.no_grad()
def _remove_parallel_gradient(W_dec: Tensor, gradient: Tensor, activation_dim: int, d_sae: int) -> Tensor:
    """Take from gradient [activation_dim, d_sae], in place, what would change the norm of W_dec's columns.

    The library's formula: W_dec over its norms, plus 1e-6.
    """
    norms = W_dec.square().sum(dim=0).sqrt() + 1e-6  # faster than norm(dim=0)
    along = (gradient * W_dec).sum(dim=0) / norms.square()
    return gradient.addcmul_(W_dec, along, value=-1)
