"""sparsify's SparseCoder on our ops: `csae.patch("sparsify")`.

Its functions `fused_encoder` and `decoder_impl` are replaced; SparseCoder, Trainer, configs and files stay the
library's. TopK SAEs and transcoders run on our ops, with or without skip connection, Multi-TopK and AuxK. AuxK's top-k
is taken without dense pre-activations too.

Unchanged: values, reconstruction and losses, to rounding; half precision under autocast in the encoder's product alone;
no gradient through `pre_acts`. The library's own code runs for groupmax, under torch.compile, and in float64 on CUDA.

What differs: `EncoderOutput.pre_acts` is computed when it is read; reading it after the weights have changed is an
error. Codes come in descending order, where the library's have none. Between equal activations the lower index wins,
where torch.topk takes any: so where fewer than k features of a token are positive, those that fill up its code at
zero, get a gradient and count as fired are the largest before the relu. In half precision the selection is made before
rounding. Second derivatives raise an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csae.ops import sparse_decode, topk_encode
from csae.ops.sparse_decode import _sparse_decode_backward, decode_backward
from csae.ops.topk_encode import _topk_encode_backward

from . import Replacement
from .features import pre_acts

PACKAGE = "eai-sparsify"
TESTED = "1.3"


def replacements() -> list[Replacement]:
    """What `csae.patch` puts into the library."""
    from sparsify import fused_encoder as encoder
    from sparsify import sparse_coder, utils

    def fused_encoder(input: Tensor, weight: Tensor, bias: Tensor | None, k: int, activation: str) -> Any:
        if activation != "topk" or bias is None or torch.compiler.is_compiling() or _too_wide(weight):
            return own_encoder(input, weight, bias, k, activation)
        values, indices = _Encode.apply(input, weight, bias, k)
        given = input.detach(), weight.detach(), bias.detach()
        return encoder.EncoderOutput(values, indices, pre_acts(*given))

    def decoder_impl(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
        if _too_wide(W_dec):
            return own_decoder(top_indices, top_acts, W_dec)
        with torch.autocast(W_dec.device.type, enabled=False):  # as the library's decoder ignores autocast
            return _Decode.apply(top_acts, top_indices.long(), W_dec.mT)  # stored latents often are int32

    own_encoder, own_decoder = encoder.fused_encoder, utils.decoder_impl
    return [
        Replacement(encoder, "fused_encoder", fused_encoder),
        Replacement(sparse_coder, "fused_encoder", fused_encoder),
        Replacement(utils, "decoder_impl", decoder_impl),
        Replacement(sparse_coder, "decoder_impl", decoder_impl),
    ]


def _too_wide(weight: Tensor) -> bool:
    return weight.dtype == torch.float64 and weight.is_cuda


class _Encode(torch.autograd.Function):
    """`topk_encode` with the library's gradient: every selected feature has one, also at zero; in weight's dtype."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = topk_encode(input, weight, bias, k)
        ctx.save_for_backward(input, weight, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, indices = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grad = grad.type_as(weight)
        found = _topk_encode_backward(grad, torch.ones_like(grad), indices, input.type_as(weight), weight, *needed)
        return *(of if need else None for of, need in zip(found, needed, strict=True)), None


class _Decode(torch.autograd.Function):
    """`sparse_decode` with the library's gradient: values at the end of a code have one at zero too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return sparse_decode(values, indices, W_dec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, W_dec = ctx.saved_tensors
        needs_values, _, needs_W = ctx.needs_input_grad
        d_values = decode_backward(grad, torch.ones_like(values), indices, W_dec) if needs_values else None
        d_W = _sparse_decode_backward(grad, values, indices, W_dec, False, True)[1] if needs_W else None
        return d_values, None, d_W
