"""SAELens: its TopK and BatchTopK SAEs encode with `topk_encode` and decode with `sparse_decode`.

Five functions are replaced: `TopKSAE.encode`, `TopKTrainingSAE.encode_with_hidden_pre`, `act_times_W_dec`, which the
decoders call, `calculate_topk_aux_acts`, which chooses among dead neurons, and
`BatchTopKTrainingSAE.update_topk_threshold`, which reads the activations. All else is the library's: configs, state
dicts, files, hooks, the trainer and its dense Adam.

The dense [n, d_sae] tensors, activations and hidden_pre, become `Lazy`: torch.Tensors in autograd's graph that are
computed when something reads them. A training step of `SAETrainer` computes none of them. Where the library gives a
sparse tensor (use_sparse_activations), so does the patch.

Which code runs:

- hooks on `hook_sae_acts_pre`: the library's. On `hook_sae_acts_post`: ours, and the hook gets an ordinary dense tensor
  (with use_sparse_activations too: the library makes one there). Other hooks: ours.
- dead neurons, and so their auxiliary loss: the library's, on the columns of the dead ones alone.
- `BatchTopKTrainingSAE`: ours, and exact, where no token has more than 8 k active features; else the library's choice
  from a dense hidden_pre. Its Matryoshka kind likewise, but its inner levels read the dense activations.
- autocast: ours, for an SAE in float32, with the library's dtypes. Products are in autocast's, but that of a sparse
  tensor with W_dec; the activations, hidden_pre and the reconstruction are float32. An SAE in another dtype: the
  library's.
- torch.compile, torch.func, another activation function, a k above d_sae, float64 on CUDA: the library's.

Results equal the library's up to rounding in the dtype (under autocast, in autocast's), except:

- ties at the k-th pre-activation: the lower index is chosen, with BatchTopK any, where the library has torch.topk's
  choice. Under autocast, values equal to the rounding of its dtype are ties: the library rounds the product and then
  adds b_enc, we round b_enc, choose from the float32 sum, and then round the activations;
- a token with a NaN among its pre-activations becomes k NaNs;
- with rescale_acts_by_decoder_norm, a decoder row of norm 0 that isn't active is harmless, not NaN for all; and
  use_sparse_activations has a backward pass;
- hidden_pre can't be read once the weights have changed: that raises RuntimeError. Read it before, or hook
  `hook_sae_acts_pre`;
- there is no second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csae.ops import topk_encode

from . import Replacement
from .batch_topk import batch_topk
from .lazy import Code, Columns, Lazy, plain, versions_of
from .topk_graph import Decode, PreActs, Product, Put, Select, Take, code_of, row_norms

PACKAGE = "sae-lens"
TESTED = "6.54"


def replacements() -> list[Replacement]:
    """What `csae.patch` puts into the library."""
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
        code = code_of(feature_acts)
        if code is None or _left_alone(W_dec):
            return act_times_W_dec_theirs(plain(feature_acts), W_dec, rescale_acts_by_decoder_norm)
        norms = _norms_known_to(feature_acts, W_dec) if rescale_acts_by_decoder_norm else None
        return Decode.apply(feature_acts, W_dec, norms, code)

    def calculate_topk_aux_acts(k_aux: int, hidden_pre: Tensor, dead_neuron_mask: Tensor) -> Tensor:
        if not (isinstance(hidden_pre, Lazy) and isinstance(hidden_pre.source, Product)):
            return calculate_topk_aux_acts_theirs(k_aux, hidden_pre, dead_neuron_mask)
        dead = dead_neuron_mask.nonzero().squeeze(1)
        narrow = Take.apply(hidden_pre, dead)
        chosen = calculate_topk_aux_acts_theirs(k_aux, narrow, dead_neuron_mask[dead])
        return Put.apply(chosen, dead, hidden_pre.shape[-1])

    def update_topk_threshold(self: Any, acts_topk: Tensor) -> None:
        # It takes the least of the positive entries, which are all in the code.
        code = code_of(acts_topk)
        update_topk_threshold_theirs(self, acts_topk if code is None else code.values)

    return [
        Replacement(topk_sae.TopKSAE, "encode", encode),
        Replacement(topk_sae.TopKTrainingSAE, "encode_with_hidden_pre", encode_with_hidden_pre),
        Replacement(topk_sae, "act_times_W_dec", act_times_W_dec),
        Replacement(topk_sae, "calculate_topk_aux_acts", calculate_topk_aux_acts),
        Replacement(BatchTopKTrainingSAE, "update_topk_threshold", update_topk_threshold),
    ]


def _takes(sae: Any) -> bool:
    """Whether our ops can encode for this SAE, as it is now."""
    from sae_lens.saes.batchtopk_sae import BatchTopK
    from sae_lens.saes.topk_sae import TopK

    chooses = sae.activation_fn
    return (
        ((type(chooses) is TopK and isinstance(chooses.k, int)) or type(chooses) is BatchTopK)
        and 0 < chooses.k <= sae.W_enc.shape[1]
        and sae.W_enc.dtype == sae.W_dec.dtype == sae.b_enc.dtype == sae.dtype
        and not _hooked(sae.hook_sae_acts_pre)
        and not _left_alone(sae.W_enc)
    )


def _hooked(point: torch.nn.Module) -> bool:
    """Whether the hook point has hooks."""
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks or point._backward_pre_hooks)


def _left_alone(weight: Tensor) -> bool:
    """Whether the library's code runs: under torch.compile or torch.func, or in dtypes that the ops do not take."""
    return (
        (torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float32)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (weight.is_cuda and weight.dtype == torch.float64)
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
        # Only b_dec in acts needs a gradient, and a product with W_enc gives it: no gather of columns.
        acts, b_dec = acts.detach(), sae.b_dec
    norms = row_norms(sae.W_dec) if sae.cfg.rescale_acts_by_decoder_norm else None
    hidden_pre = sae.hook_sae_acts_pre(PreActs.apply(acts, b_dec, sae.W_enc, sae.b_enc, norms))
    code = _select(hidden_pre.source, sae.activation_fn)
    if code is None:
        hidden_pre = plain(hidden_pre)
        return sae.hook_sae_acts_post(sae.activation_fn(hidden_pre)), hidden_pre
    feature_acts = Select.apply(hidden_pre, code, getattr(sae.activation_fn, "use_sparse_activations", False))
    if isinstance(feature_acts, Lazy):
        if _hooked(sae.hook_sae_acts_post):
            feature_acts = plain(feature_acts)
        else:
            feature_acts.note = sae.W_dec, versions_of(sae.W_dec), norms
    return sae.hook_sae_acts_post(feature_acts), hidden_pre


@torch.no_grad()
def _select(product: Product, activation_fn: Any) -> Code | None:
    """What the activation function, TopK or BatchTopK, keeps of hidden_pre. None where `batch_topk` can't tell."""
    from sae_lens.saes.topk_sae import TopK

    acts, W_enc, b_enc, norms, _ = product
    if norms is not None:
        W_enc, b_enc = W_enc * norms, b_enc * norms
    if type(activation_fn) is TopK:
        code: Code | None = Code(*topk_encode(acts, W_enc.T, b_enc, activation_fn.k), W_enc.shape[1])
    else:
        code = batch_topk(acts, W_enc.T, b_enc, activation_fn.k)
    return None if code is None else code._replace(values=code.values.to(b_enc.dtype))


def _norms_known_to(feature_acts: Tensor, W_dec: Tensor) -> Tensor:
    """The norms that the encoder computed, where W_dec has not changed since: so their backward pass runs once."""
    if isinstance(feature_acts, Lazy) and feature_acts.note is not None:
        of, versions, norms = feature_acts.note
        tracked = W_dec.requires_grad and torch.is_grad_enabled()
        if norms is not None and of is W_dec and versions == versions_of(W_dec) and norms.requires_grad == tracked:
            return norms
    return row_norms(W_dec)
