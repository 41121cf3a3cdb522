"""A TopK SAE's hidden_pre, code and reconstruction as nodes of autograd's graph, of which none is dense.

    hidden_pre = PreActs(acts, W_enc, b_enc, norms)     lazy: not computed, unless it is read
    feature_acts = Select(hidden_pre, code)             lazy, or sparse: a code, not a scatter of it
    out = Decode(feature_acts, W_dec, norms)            a gather

in SAELens' layout and names: W_enc [d_in, d_sae], W_dec [d_sae, d_in], norms [d_sae] of W_dec's rows. Gradients between
these nodes are lazy too: each holds just the entries at the code, which is all that the next node needs. Reading one,
or adding to it, makes it dense. There is no second derivative.

Under autocast the two products run in its dtype, forward and backward. All else has the weights' dtype: hidden_pre, the
code, norms, gradients. Weights are cast where they are multiplied: no second copy is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from csae.ops import sparse_decode
from csae.ops.checks import autocast_to
from csae.ops.threshold_encode import rows_of

from .lazy import Code, Columns, Lazy, Sum, dense, versions_of


class Product(NamedTuple):
    """hidden_pre, not yet computed: ((acts W_enc) + b_enc) norms, of which the product is in acts' dtype."""

    acts: Tensor
    W_enc: Tensor
    b_enc: Tensor
    norms: Tensor | None
    versions: tuple[int, ...]

    def dense(self) -> Tensor:
        self._check_versions()
        return _pre_acts(self.acts, self.W_enc, self.b_enc, self.norms)

    def columns(self, features: Tensor) -> Tensor:
        """Some columns of it [..., m]."""
        self._check_versions()
        norms = None if self.norms is None else self.norms[features]
        return _pre_acts(self.acts, self.W_enc[:, features], self.b_enc[features], norms)

    def _check_versions(self) -> None:
        if self.versions != versions_of(self.W_enc, self.b_enc):
            raise RuntimeError(
                "hidden_pre: the weights have changed since, and under csae.patch it is computed when it is first "
                "read; read it before the optimizer's step, or add a hook to hook_sae_acts_pre"
            )


def _pre_acts(acts: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None) -> Tensor:
    pre_acts = acts @ W_enc.to(acts.dtype) + b_enc
    return pre_acts if norms is None else pre_acts.mul_(norms)


class _Selected(NamedTuple):
    """The gradient of hidden_pre through what was selected of it."""

    grad: Code | Columns
    values: Tensor
    """hidden_pre where grad is not zero; [..., k] or [..., m] as the gradient's own"""

    def dense(self) -> Tensor:
        return self.grad.dense()


class _Decoded(NamedTuple):
    """The gradient of activations through the decoder: (grad W_dec^T) / norms."""

    grad: Tensor
    W_dec: Tensor
    norms: Tensor | None
    versions: tuple[int, ...]
    code: Code
    """of the gradient, where the activations' code is"""

    def dense(self) -> Tensor:
        if self.versions != versions_of(self.W_dec):
            raise RuntimeError("the gradient of feature_acts: W_dec has changed since; read it before the step")
        grad = (self.grad @ self.W_dec.T.to(self.grad.dtype)).to(self.code.values.dtype)
        return grad if self.norms is None else grad.div_(self.norms)


class PreActs(Function):
    """hidden_pre [..., d_sae] of acts [..., d_in], W_enc [d_in, d_sae], b_enc and norms [d_sae]; lazy.

    b_dec: if given, has been subtracted from acts, which take no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None
    ) -> Tensor:
        (acts,) = autocast_to(acts)
        ctx.save_for_backward(acts, W_enc, b_enc, norms)
        product = Product(acts, W_enc.detach(), b_enc.detach(), norms, versions_of(W_enc, b_enc))
        return Lazy(product, (*acts.shape[:-1], W_enc.shape[1]), b_enc.dtype, acts.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_acts, need_b_dec, need_W, need_b, need_norms = ctx.needs_input_grad
        needed = need_acts, need_W, need_b or need_b_dec, need_norms
        of = _Inputs(*ctx.saved_tensors)
        code, columns = _parts(grad)
        total = _dense_gradients(dense(grad), of, needed) if code is None else _code_gradients(code, of, needed)
        if columns is not None:
            _add_columns_gradients(columns, of, total)
        return (
            total.acts,
            -(of.W_enc @ total.b_enc) if need_b_dec and total.b_enc is not None else None,
            total.W_enc.T if total.W_enc is not None else None,
            total.b_enc if need_b else None,
            total.norms,
        )


def _parts(grad: Tensor) -> tuple[_Selected | None, _Selected | None]:
    """The gradient through a code, and that through the dead neurons if any; None, None for another gradient."""
    source = grad.source if isinstance(grad, Lazy) else None
    parts = [part for part in (source if isinstance(source, Sum) else (source,)) if isinstance(part, _Selected)]
    codes = [part for part in parts if isinstance(part.grad, Code)]
    columns = [part for part in parts if isinstance(part.grad, Columns)]
    if len(codes) != 1 or len(parts) != (2 if isinstance(source, Sum) else 1):
        return None, None
    return codes[0], columns[0] if columns else None


class _Inputs(NamedTuple):
    """What hidden_pre was computed from."""

    acts: Tensor
    W_enc: Tensor
    b_enc: Tensor
    norms: Tensor | None


class _Gradients(NamedTuple):
    """Of what hidden_pre was computed from; None where it is not needed."""

    acts: Tensor | None
    W_enc: Tensor | None
    """[d_sae, d_in]: transposed"""
    b_enc: Tensor | None
    norms: Tensor | None


def _code_gradients(part: _Selected, of: _Inputs, needed: tuple[bool, ...]) -> _Gradients:
    d_pre, indices, _ = part.grad
    scaled = (d_pre if of.norms is None else d_pre * of.norms[indices]).to(of.acts.dtype)
    W_enc = of.W_enc.to(of.acts.dtype) if needed[0] else of.W_enc  # else it is not read, so not cast
    # An all-ones mask: the gradient is zero already where the relu is.
    found = torch.ops.csae.topk_encode_backward(scaled, torch.ones_like(scaled), indices, of.acts, W_enc.T, *needed[:3])
    d_acts, d_W, d_b = (d.to(of.W_enc.dtype) if need else None for d, need in zip(found, needed[:3], strict=True))
    d_norms = _per_norm(d_pre * part.values, indices, of.norms) if of.norms is not None and needed[3] else None
    return _Gradients(d_acts, d_W, d_b, d_norms)


def _add_columns_gradients(part: _Selected, of: _Inputs, total: _Gradients) -> None:
    """Add the gradients through some columns to those that there are."""
    grad, features, _ = part.grad
    norms = None if of.norms is None else of.norms[features]
    d_pre = rows_of(grad if norms is None else grad * norms)
    needed = total.acts is not None, total.W_enc is not None
    d_acts, d_W = _product_gradients(d_pre, of.acts, of.W_enc[:, features], *needed)
    if total.acts is not None and d_acts is not None:
        total.acts.add_(d_acts)
    if total.W_enc is not None and d_W is not None:
        total.W_enc[features] += d_W
    if total.b_enc is not None:
        total.b_enc[features] += d_pre.sum(0)
    if total.norms is not None and norms is not None:
        products = rows_of(grad * part.values).sum(0)
        total.norms[features] += torch.where(norms > 0, products / norms, 0)


def _dense_gradients(d_pre: Tensor, of: _Inputs, needed: tuple[bool, ...]) -> _Gradients:
    need_acts, need_W, need_b, need_norms = needed
    d_norms = rows_of(d_pre * _pre_acts(*of._replace(norms=None))).sum(0) if need_norms else None
    d_pre = rows_of(d_pre if of.norms is None else d_pre * of.norms)
    d_acts, d_W = _product_gradients(d_pre, of.acts, of.W_enc, need_acts, need_W)
    return _Gradients(d_acts, d_W, d_pre.sum(0) if need_b else None, d_norms)


def _product_gradients(
    d_pre: Tensor, acts: Tensor, W_enc: Tensor, need_acts: bool, need_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of acts [..., d_in], and of W_enc [d_in, m] transposed, through d_pre [n, m]: products in acts' dtype."""
    d_pre = d_pre.to(acts.dtype)
    d_acts = (d_pre @ W_enc.T.to(acts.dtype)).view(acts.shape).to(W_enc.dtype) if need_acts else None
    d_W = (d_pre.T @ acts.reshape(-1, acts.shape[-1])).to(W_enc.dtype) if need_W else None
    return d_acts, d_W


class Take(Function):
    """The columns [..., m] of hidden_pre for some features, without the others."""

    @staticmethod
    def forward(ctx: Any, hidden_pre: Lazy, features: Tensor) -> Tensor:
        product = hidden_pre.source
        assert isinstance(product, Product)
        ctx.shape, ctx.features = hidden_pre.shape, features
        narrow = product.columns(features)
        ctx.save_for_backward(narrow)
        return narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (narrow,) = ctx.saved_tensors
        through = _Selected(Columns(grad, ctx.features, ctx.shape[-1]), narrow)
        return Lazy(through, tuple(ctx.shape), grad.dtype, grad.device), None


class Put(Function):
    """Columns [..., m] in their place in a lazy [..., d_sae], zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, d_sae: int) -> Tensor:
        ctx.features = features
        return Lazy.of(Columns(values, features, d_sae))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(-1, ctx.features), None, None


class Select(Function):
    """The code of hidden_pre, in autograd's graph: a lazy tensor of the same shape, or a sparse one."""

    @staticmethod
    def forward(ctx: Any, hidden_pre: Lazy, code: Code, sparse: bool) -> Tensor:
        ctx.code = code
        return _sparse(code) if sparse else Lazy.of(code)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, indices, d_sae = ctx.code
        found = _entries(grad, indices)
        found = torch.where(values <= 0, 0, found)
        through = _Selected(Code(found, indices, d_sae), values)
        shape = (*values.shape[:-1], d_sae)
        return Lazy(through, shape, values.dtype, values.device), None, None


class Scatter(Function):
    """A lazy tensor [..., d_sae] of zeros, into which values, indices [..., k] are put, in place."""

    @staticmethod
    def forward(ctx: Any, zeros: Lazy, values: Tensor, indices: Tensor) -> Tensor:
        # Copies: the caller holds values and indices too, and may write into them.
        ctx.indices = indices.clone()
        zeros.content.source = Code(values.detach().clone(), ctx.indices, zeros.shape[-1])
        ctx.mark_dirty(zeros)
        return zeros

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, _entries(grad, ctx.indices), None


def _entries(grad: Tensor, indices: Tensor) -> Tensor:
    """The gradient [..., k] of a code through that of its dense tensor."""
    source = grad.source if isinstance(grad, Lazy) else None
    code = source.code if isinstance(source, _Decoded) else code_of(grad)
    if code is not None and (code.indices is indices or torch.equal(code.indices, indices)):
        return code.values
    return dense(grad.to_dense()).gather(-1, indices)


class Decode(Function):
    """(feature_acts / norms) W_dec, of activations whose code is given; W_dec [d_sae, d_in], norms [d_sae]."""

    @staticmethod
    def forward(ctx: Any, feature_acts: Tensor, W_dec: Tensor, norms: Tensor | None, code: Code) -> Tensor:
        values = code.values if norms is None else code.values / norms[code.indices]
        ctx.save_for_backward(W_dec, norms)
        ctx.code, ctx.sparse = code._replace(values=values), feature_acts.is_sparse
        if feature_acts.is_sparse:  # SAELens multiplies these in their own dtype
            with torch.autocast(W_dec.device.type, enabled=False):
                return sparse_decode(values, code.indices, W_dec)
        return sparse_decode(values, code.indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_dec, norms = ctx.saved_tensors
        values, indices, d_sae = ctx.code
        need_acts, need_W, need_norms, _ = ctx.needs_input_grad
        found = torch.ops.csae.sparse_decode_backward(
            grad, values.to(grad.dtype), indices, W_dec.to(grad.dtype), need_acts or need_norms, need_W
        )
        d_values, d_W = (d.to(values.dtype) for d in found)
        d_norms = _per_norm(-d_values * values, indices, norms) if need_norms else None
        d_acts = None
        if need_acts:
            d_code = Code(d_values if norms is None else d_values / norms[indices], indices, d_sae)
            through = _Decoded(grad, W_dec, norms, versions_of(W_dec), d_code)
            shape = (*grad.shape[:-1], d_sae)
            d_acts = _sparse(d_code) if ctx.sparse else Lazy(through, shape, values.dtype, grad.device)
        return d_acts, d_W if need_W else None, d_norms, None


class _Norms(Function):
    """The norms of W_dec's rows [d_sae], with a backward pass that reads W_dec once."""

    @staticmethod
    def forward(ctx: Any, W_dec: Tensor) -> Tensor:
        norms = W_dec.norm(dim=-1)
        ctx.save_for_backward(W_dec, norms)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        W_dec, norms = ctx.saved_tensors
        return W_dec * torch.where(norms > 0, grad / norms, 0).unsqueeze(1)


row_norms: Callable[[Tensor], Tensor] = _Norms.apply


def _per_norm(products: Tensor, indices: Tensor, norms: Tensor) -> Tensor:
    """Products [..., k] summed for each feature, over its norm: the gradient of norms [d_sae]."""
    ones = products.new_ones(*products.shape[:-1], 1)
    table = norms.new_empty(norms.shape[0], 1)
    _, sums = torch.ops.csae.sparse_decode_backward(ones, products, indices, table, False, True)
    return torch.where(norms > 0, sums.squeeze(1) / norms, 0)


def _sparse(code: Code) -> Tensor:
    """The sparse tensor that SAELens' TopK gives."""
    shape = code.values.shape[:-1]
    where = torch.ones(shape, dtype=torch.bool, device=code.values.device).nonzero()  # [n, dimensions of the batch]
    rows = where.repeat_interleave(code.values.shape[-1], dim=0).T
    places = torch.cat([rows, code.indices.reshape(1, -1)])
    return torch.sparse_coo_tensor(places, code.values.flatten(), (*shape, code.d_sae), check_invariants=False)


def code_of(feature_acts: Tensor) -> Code | None:
    """The code of lazy activations that are not made yet, or of sparse ones with k entries a token; else None."""
    if isinstance(feature_acts, Lazy):
        return feature_acts.source if isinstance(feature_acts.source, Code) else None
    if feature_acts.layout != torch.sparse_coo or feature_acts.dense_dim() != 0:
        return None
    shape, entries = feature_acts.shape[:-1], feature_acts._nnz()
    n = shape.numel()
    if n == 0 or entries == 0 or entries % n:
        return None
    places = feature_acts._indices()
    token = torch.zeros_like(places[0])
    for size, place in zip(shape, places, strict=False):
        token = token * size + place
    if not torch.equal(token.view(n, -1), torch.arange(n, device=token.device).unsqueeze(1).expand(n, entries // n)):
        return None
    per_token = (*shape, entries // n)
    indices = places[-1].reshape(per_token)
    if bool((indices.sort(dim=-1).values.diff(dim=-1) == 0).any()):
        return None  # a feature that occurs twice
    return Code(feature_acts._values().reshape(per_token), indices, feature_acts.shape[-1])
