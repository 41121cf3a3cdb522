"""The look-back with PyTorch's own attention: FlexAttention, and scaled_dot_product_attention (SDPA).

Scores, mask and null slot are ours. FlexAttention takes the scores as a function. Its null slot is either one more key
with value zero, or a correction of the result: out * sigmoid(lse - null), where lse is the log of the softmax's
denominator. SDPA takes the bias of the scores, [H, T, 1 + T].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear, pad, scaled_dot_product_attention

from csae.ops.heads import bounded_heads, unit_heads

from .data import Built, Data, Skip
from .plain import sparse_encode
from .step import LR, SLOWER, Step

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def look_back(attention: Attention) -> Callable[[Data], Built]:
    """Forward and backward of q, k [B, T, H, d_head], v [B, T, H, d_value], slope, null [H]."""

    def build(data: Data) -> Built:
        inputs = [tensor.detach().requires_grad_() for tensor in (*data.qkv, data.slope, data.null)]
        grad = data.grad_look_back

        def run() -> tuple[Tensor, ...]:
            out = attention(*inputs)
            return out, *torch.autograd.grad(out, inputs, grad)

        names = ("out", "q", "k", "v", "slope", "null")
        return Built(run, lambda: dict(zip(names, run(), strict=True)))

    return build


def sdpa(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor) -> Tensor:
    """The null slot is key 0: a key of zeros with the bias `null`."""
    T, H = q.shape[1:3]
    log_distance, visible = _distances(T, q.device)
    bias = (-slope[:, None, None] * log_distance.to(slope.dtype)).masked_fill(~visible, -torch.inf)  # [H, T, T]
    bias = torch.cat([null[:, None, None].expand(H, T, 1), bias], dim=2)
    q, k, v = q.transpose(1, 2), pad(k.transpose(1, 2), (0, 0, 1, 0)), pad(v.transpose(1, 2), (0, 0, 1, 0))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype)).transpose(1, 2)


@cache
def _distances(T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """log(t - j) [T, T], and where j < t."""
    position = torch.arange(T, device=device)
    distance = position[:, None] - position
    return distance.clamp(min=1).float().log(), distance > 0


def flex(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor) -> Tensor:
    """The null slot by the softmax's denominator."""
    _only_on_cuda(q)
    from torch.nn.attention.flex_attention import AuxRequest

    def score(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return score - slope[h] * torch.log((t - j).clamp(min=1).float())

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = _block_mask(q.shape[2], q.shape[2], q.device)
    out, aux = _flex()(q, k, v, score_mod=score, block_mask=mask, return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(aux.lse - null.float()[:, None])
    return (out * share[..., None].to(out.dtype)).transpose(1, 2)


def flex_null_key(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, null: Tensor) -> Tensor:
    """The null slot as key T: a key of zeros with the score `null`."""
    _only_on_cuda(q)
    T = q.shape[1]

    def score(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return torch.where(j == T, null[h].float(), score - slope[h] * torch.log((t - j).clamp(min=1).float()))

    q, k, v = q.transpose(1, 2), pad(k.transpose(1, 2), (0, 0, 0, 1)), pad(v.transpose(1, 2), (0, 0, 0, 1))
    return _flex()(q, k, v, score_mod=score, block_mask=_block_mask(T, T + 1, q.device)).transpose(1, 2)


def _only_on_cuda(q: Tensor) -> None:
    if q.device.type != "cuda":
        raise Skip("FlexAttention has no backward pass on a CPU")


@cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(T: int, keys: int, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, t, j: (j < t) | (j == T), None, None, T, keys, device=device)


def contextual_step(data: Data) -> Built:
    """A contextual training step, one sweep, of plain PyTorch: embedding_bag for the codes, SDPA for the look-back."""
    shape = data.shape
    state = Step(data.weights | data.look_back)
    parameters = dict(zip(state.start, state.own(), strict=True))
    others = [parameter for name, parameter in parameters.items() if name not in data.look_back]
    slower = {"params": [parameters[name] for name in data.look_back], "lr": SLOWER}
    groups: list[dict] = [{"params": others}, slower]
    optimizer = torch.optim.Adam(groups, lr=LR, fused=True)
    x = data.x.float()
    windows = (shape.windows, shape.T, shape.heads)

    def run() -> None:
        optimizer.zero_grad()
        cast = {name: parameter.to(data.dtype) for name, parameter in parameters.items()}
        W_enc, b_enc, W_dec = (cast[name] for name in ("W_enc", "b_enc", "W_dec"))
        b_dec = parameters["b_dec"]
        centred = x - b_dec
        values, indices = sparse_encode(centred.to(data.dtype), W_enc, b_enc, shape.k)
        memory = embedding_bag(indices, cast["W_mem"], per_sample_weights=values, mode="sum")
        q = unit_heads(linear(centred.to(data.dtype), cast["W_Q"]).view(*windows, shape.d_head))
        q = q * cast["gain"][:, None]
        k = unit_heads(linear(memory, cast["W_K"]).view(*windows, shape.d_head))
        v = bounded_heads(linear(memory, cast["W_V"]).view(*windows, shape.d_value))
        carried = linear(sdpa(q, k, v, cast["slope"], cast["null"]).reshape(shape.n, -1), cast["W_O"])
        values, indices = sparse_encode((centred - carried).to(data.dtype), W_enc, b_enc, shape.k)
        x_hat = embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + carried + b_dec
        ((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()).backward()
        with torch.no_grad():
            W_dec = parameters["W_dec"]
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
            optimizer.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)

    return state.built(run)
