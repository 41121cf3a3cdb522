"""SAELens: its TopK and BatchTopK SAEs encode with `topk_encode` and decode with `sparse_decode`.

Five functions are replaced: `TopKSAE.encode`, `TopKTrainingSAE.encode_with_hidden_pre`, `act_times_W_dec`, which the
decoders call, `calculate_topk_aux_acts`, which chooses among dead neurons, and
`BatchTopKTrainingSAE.update_topk_threshold`, which reads the activations. All else is the library's: configs, state
dicts, files, hooks, the trainer and its dense Adam.

What was a dense [n, d_sae] tensor, the activations and hidden_pre, is a `Lazy` one: a torch.Tensor that reads like the
library's, is part of autograd's graph, and is made only when something reads it. A training step of `SAETrainer` makes
none of them. Where the library gives a sparse tensor (use_sparse_activations), so does the patch.

Which code runs:

- hooks on `hook_sae_acts_pre`: the library's. On `hook_sae_acts_post`: ours, and the hook gets an ordinary dense tensor
  (with use_sparse_activations too: the library makes one there). Other hooks: ours.
- dead neurons, and so their auxiliary loss: the library's, on the columns of the dead ones alone.
- `BatchTopKTrainingSAE`: ours, and exact, where no token has more than 4 k active features; else the library's choice
  from a dense hidden_pre. Its Matryoshka kind likewise, but its inner levels read the dense activations.
- autocast, torch.compile, torch.func, another activation function, a k above d_sae: the library's.

Results are the library's to the rounding of the dtype, but where it is arbitrary or broken:

- of equal pre-activations at the edge of the k, the lower index is chosen, and of a batch any: the library's choice is
  torch.topk's;
- a token with a NaN among its pre-activations becomes k NaNs;
- with rescale_acts_by_decoder_norm, a decoder row of norm 0 that isn't active is harmless, not NaN for all; and
  use_sparse_activations has a backward pass;
- hidden_pre can't be read once the weights have changed: that raises RuntimeError. Read it before, or hook
  `hook_sae_acts_pre`;
- there is no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from csae.ops import sparse_decode, topk_encode

from . import Replacement
from .batch_topk import batch_topk
from .lazy import Code, Columns, Lazy, Sum, dense, plain

PACKAGE = "sae-lens"
TESTED = "6.54"


def replacements() -> list[Replacement]:
    """What takes the place of what in sae_lens."""
    from sae_lens.saes import topk_sae
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE

    encode_theirs = topk_sae.TopKSAE.encode
    encode_with_hidden_pre_theirs = topk_sae.TopKTrainingSAE.encode_with_hidden_pre
    act_times_W_dec_theirs = topk_sae.act_times_W_dec
    calculate_topk_aux_acts_theirs = topk_sae.calculate_topk_aux_acts
    update_topk_threshold_theirs = BatchTopKTrainingSAE.update_topk_threshold

    def encode(self: Any, x: Tensor) -> Tensor:
        return _encode(self, x)[0] if _takes(self) else encode_theirs(self, x)

    def encode_with_hidden_pre(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return _encode(self, x) if _takes(self) else encode_with_hidden_pre_theirs(self, x)

    def act_times_W_dec(feature_acts: Tensor, W_dec: Tensor, rescale_acts_by_decoder_norm: bool) -> Tensor:
        if isinstance(feature_acts, Lazy) and isinstance(feature_acts.source, Columns):
            values, features, _ = feature_acts.source
            return act_times_W_dec_theirs(values, W_dec.index_select(0, features), rescale_acts_by_decoder_norm)
        code = _code(feature_acts)
        if code is None or _transformed(W_dec.device):
            return act_times_W_dec_theirs(plain(feature_acts), W_dec, rescale_acts_by_decoder_norm)
        norms = _norms_known_to(feature_acts, W_dec) if rescale_acts_by_decoder_norm else None
        return _Decode.apply(feature_acts, W_dec, norms, code)

    def calculate_topk_aux_acts(k_aux: int, hidden_pre: Tensor, dead_neuron_mask: Tensor) -> Tensor:
        if not (isinstance(hidden_pre, Lazy) and isinstance(hidden_pre.source, _Product)):
            return calculate_topk_aux_acts_theirs(k_aux, hidden_pre, dead_neuron_mask)
        dead = dead_neuron_mask.nonzero().squeeze(1)
        narrow = _Take.apply(hidden_pre, dead)
        chosen = calculate_topk_aux_acts_theirs(k_aux, narrow, dead_neuron_mask[dead])
        return _Put.apply(chosen, dead, hidden_pre.shape[-1])

    def update_topk_threshold(self: Any, acts_topk: Tensor) -> None:
        # It takes the least of the positive ones, which are all in the code.
        code = _code(acts_topk)
        update_topk_threshold_theirs(self, acts_topk if code is None else code.values)

    return [
        Replacement(topk_sae.TopKSAE, "encode", encode),
        Replacement(topk_sae.TopKTrainingSAE, "encode_with_hidden_pre", encode_with_hidden_pre),
        Replacement(topk_sae, "act_times_W_dec", act_times_W_dec),
        Replacement(topk_sae, "calculate_topk_aux_acts", calculate_topk_aux_acts),
        Replacement(BatchTopKTrainingSAE, "update_topk_threshold", update_topk_threshold),
    ]


def _takes(sae: Any) -> bool:
    """Whether the SAE, as it is now, is one that we encode."""
    from sae_lens.saes.batchtopk_sae import BatchTopK
    from sae_lens.saes.topk_sae import TopK

    chooses = sae.activation_fn
    return (
        ((type(chooses) is TopK and isinstance(chooses.k, int)) or type(chooses) is BatchTopK)
        and 1 <= chooses.k <= sae.W_enc.shape[1]
        and sae.W_enc.dtype == sae.W_dec.dtype == sae.b_enc.dtype == sae.dtype
        and not _hooked(sae.hook_sae_acts_pre)
        and not _transformed(sae.W_enc.device)
    )


def _hooked(point: torch.nn.Module) -> bool:
    """Whether what passes here is looked at."""
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def _transformed(device: torch.device) -> bool:
    """Whether what runs now is autocast, traced, or under a transform of torch.func."""
    return (
        torch.is_autocast_enabled(device.type)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )


def _encode(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The activations, and hidden_pre, as `encode_with_hidden_pre` has them."""
    from sae_lens.saes.sae import SAE

    acts = sae.process_sae_in(x)
    b_dec = None
    if (
        not x.requires_grad
        and sae.cfg.apply_b_dec_to_input
        and not _hooked(sae.hook_sae_input)
        and type(sae).process_sae_in is SAE.process_sae_in
    ):
        # Nothing in acts has a gradient but b_dec, whose gradient is a product with W_enc: no gather of its columns.
        acts, b_dec = acts.detach(), sae.b_dec
    norms = _norms(sae.W_dec) if sae.cfg.rescale_acts_by_decoder_norm else None
    hidden_pre = sae.hook_sae_acts_pre(_PreActs.apply(acts, b_dec, sae.W_enc, sae.b_enc, norms))
    code = _select(hidden_pre.source, sae.activation_fn)
    if code is None:
        hidden_pre = plain(hidden_pre)
        return sae.hook_sae_acts_post(sae.activation_fn(hidden_pre)), hidden_pre
    feature_acts = _Select.apply(hidden_pre, code, getattr(sae.activation_fn, "use_sparse_activations", False))
    if isinstance(feature_acts, Lazy):
        if _hooked(sae.hook_sae_acts_post):
            feature_acts = plain(feature_acts)
        else:
            feature_acts.note = sae.W_dec, _versions(sae.W_dec), norms
    return sae.hook_sae_acts_post(feature_acts), hidden_pre


@torch.no_grad()
def _select(product: _Product, activation_fn: Any) -> Code | None:
    """What the activation function, TopK or BatchTopK, keeps of hidden_pre. None where that can't be told so."""
    from sae_lens.saes.topk_sae import TopK

    acts, W_enc, b_enc, norms, _ = product
    if norms is not None:
        W_enc, b_enc = W_enc * norms, b_enc * norms
    if type(activation_fn) is not TopK:
        return batch_topk(acts, W_enc.T, b_enc, activation_fn.k)
    return Code(*topk_encode(acts, W_enc.T, b_enc, activation_fn.k), W_enc.shape[1])


def _versions(*weights: Tensor) -> tuple[int, ...]:
    """How often each has been changed in place; what was made in inference mode doesn't say."""
    return tuple(0 if weight.is_inference() else weight._version for weight in weights)


class _Product(NamedTuple):
    """hidden_pre, not yet computed: ((acts W_enc) + b_enc) norms."""

    acts: Tensor
    W_enc: Tensor
    b_enc: Tensor
    norms: Tensor | None
    versions: tuple[int, ...]

    def dense(self) -> Tensor:
        if self.versions != _versions(self.W_enc, self.b_enc):
            raise RuntimeError(
                "hidden_pre: the weights have changed since, and under csae.patch it is computed when it is first "
                "read; read it before the optimizer's step, or add a hook to hook_sae_acts_pre"
            )
        return _pre_acts(self.acts, self.W_enc, self.b_enc, self.norms)

    def columns(self, features: Tensor) -> Tensor:
        """Some columns of it [..., m]."""
        norms = None if self.norms is None else self.norms[features]
        return _pre_acts(self.acts, self.W_enc[:, features], self.b_enc[features], norms)


def _pre_acts(acts: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None) -> Tensor:
    pre_acts = acts @ W_enc + b_enc
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
        if self.versions != _versions(self.W_dec):
            raise RuntimeError("the gradient of feature_acts: W_dec has changed since; read it before the step")
        grad = self.grad @ self.W_dec.T
        return grad if self.norms is None else grad.div_(self.norms)


class _PreActs(Function):
    """hidden_pre [..., d_sae] of acts [..., d_in], W_enc [d_in, d_sae], b_enc and norms [d_sae]; lazy.

    b_dec: if given, has been subtracted from acts, which take no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, b_dec: Tensor | None, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(acts, W_enc, b_enc, norms)
        product = _Product(acts, W_enc.detach(), b_enc.detach(), norms, _versions(W_enc, b_enc))
        return Lazy(product, (*acts.shape[:-1], W_enc.shape[1]), acts.dtype, acts.device)

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
    scaled = d_pre if of.norms is None else d_pre * of.norms[indices]
    # The op's own mask for the relu lets all pass: it is in the gradient already.
    found = torch.ops.csae.topk_encode_backward(
        scaled, torch.ones_like(scaled), indices, of.acts, of.W_enc.T, *needed[:3]
    )
    d_acts, d_W, d_b = (d if need else None for d, need in zip(found, needed[:3], strict=True))
    d_norms = _per_norm(d_pre * part.values, indices, of.norms) if of.norms is not None and needed[3] else None
    return _Gradients(d_acts, d_W, d_b, d_norms)


def _add_columns_gradients(part: _Selected, of: _Inputs, total: _Gradients) -> None:
    """Add the gradients through some columns to those that there are."""
    grad, features, _ = part.grad
    norms = None if of.norms is None else of.norms[features]
    d_pre = (grad if norms is None else grad * norms).flatten(0, -2)  # [n, m]
    if total.acts is not None:
        total.acts.add_((d_pre @ of.W_enc[:, features].T).view(total.acts.shape))
    if total.W_enc is not None:
        total.W_enc[features] += d_pre.T @ of.acts.reshape(-1, of.acts.shape[-1])
    if total.b_enc is not None:
        total.b_enc[features] += d_pre.sum(0)
    if total.norms is not None and norms is not None:
        products = (grad * part.values).flatten(0, -2).sum(0)
        total.norms[features] += torch.where(norms > 0, products / norms, 0)


def _dense_gradients(d_pre: Tensor, of: _Inputs, needed: tuple[bool, ...]) -> _Gradients:
    need_acts, need_W, need_b, need_norms = needed
    d_norms = (d_pre * _pre_acts(*of._replace(norms=None))).flatten(0, -2).sum(0) if need_norms else None
    d_pre = (d_pre if of.norms is None else d_pre * of.norms).flatten(0, -2)
    d_acts = (d_pre @ of.W_enc.T).view(of.acts.shape) if need_acts else None
    d_W = d_pre.T @ of.acts.reshape(-1, of.acts.shape[-1]) if need_W else None
    return _Gradients(d_acts, d_W, d_pre.sum(0) if need_b else None, d_norms)


class _Take(Function):
    """The columns [..., m] of hidden_pre for some features, without the others."""

    @staticmethod
    def forward(ctx: Any, hidden_pre: Lazy, features: Tensor) -> Tensor:
        product = hidden_pre.source
        assert isinstance(product, _Product)
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


class _Put(Function):
    """Columns [..., m] in their place in a lazy [..., d_sae], zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, d_sae: int) -> Tensor:
        ctx.features = features
        return Lazy.of(Columns(values, features, d_sae))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(-1, ctx.features), None, None


class _Select(Function):
    """The code of hidden_pre, in autograd's graph: a lazy tensor of the same shape, or a sparse one."""

    @staticmethod
    def forward(ctx: Any, hidden_pre: Lazy, code: Code, sparse: bool) -> Tensor:
        ctx.code = code
        return _sparse(code) if sparse else Lazy.of(code)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, indices, d_sae = ctx.code
        source = grad.source if isinstance(grad, Lazy) else None
        code = source.code if isinstance(source, _Decoded) else _code(grad)
        if code is None or not (code.indices is indices or torch.equal(code.indices, indices)):
            found = dense(grad.to_dense()).gather(-1, indices)
        else:
            found = code.values
        found = torch.where(values <= 0, 0, found)
        through = _Selected(Code(found, indices, d_sae), values)
        shape = (*values.shape[:-1], d_sae)
        return Lazy(through, shape, values.dtype, values.device), None, None


class _Decode(Function):
    """(feature_acts / norms) W_dec, of activations whose code is given; W_dec [d_sae, d_in], norms [d_sae]."""

    @staticmethod
    def forward(ctx: Any, feature_acts: Tensor, W_dec: Tensor, norms: Tensor | None, code: Code) -> Tensor:
        values = code.values if norms is None else code.values / norms[code.indices]
        ctx.save_for_backward(W_dec, norms)
        ctx.code, ctx.sparse = code._replace(values=values), feature_acts.is_sparse
        return sparse_decode(values, code.indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_dec, norms = ctx.saved_tensors
        values, indices, d_sae = ctx.code
        need_acts, need_W, need_norms, _ = ctx.needs_input_grad
        d_values, d_W = torch.ops.csae.sparse_decode_backward(
            grad, values, indices, W_dec, need_acts or need_norms, need_W
        )
        d_norms = _per_norm(-d_values * values, indices, norms) if need_norms else None
        d_acts = None
        if need_acts:
            d_code = Code(d_values if norms is None else d_values / norms[indices], indices, d_sae)
            through = _Decoded(grad, W_dec, norms, _versions(W_dec), d_code)
            shape = (*grad.shape[:-1], d_sae)
            d_acts = _sparse(d_code) if ctx.sparse else Lazy(through, shape, grad.dtype, grad.device)
        return d_acts, d_W if need_W else None, d_norms, None


class _Norms(Function):
    """The norms of W_dec's rows [d_sae], with a backward pass that goes through memory once."""

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


_norms: Callable[[Tensor], Tensor] = _Norms.apply


def _norms_known_to(feature_acts: Tensor, W_dec: Tensor) -> Tensor:
    """The norms that the encoder computed, where they still hold: W_dec's gradient then goes through them once."""
    if isinstance(feature_acts, Lazy) and feature_acts.note is not None:
        of, versions, norms = feature_acts.note
        tracked = W_dec.requires_grad and torch.is_grad_enabled()
        if norms is not None and of is W_dec and versions == _versions(W_dec) and norms.requires_grad == tracked:
            return norms
    return _norms(W_dec)


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


def _code(feature_acts: Tensor) -> Code | None:
    """The code of activations that still have one: lazy ones, or sparse ones with k entries for each token."""
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
    return Code(feature_acts._values().reshape(per_token), places[-1].reshape(per_token), feature_acts.shape[-1])
