"""What both SAEs share, as autoencoder and as transcoder: parameters, loss, unit-norm decoder, dead features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from csae.calibration import calibrate
from csae.dead_rows import Dead
from csae.errors import UserError
from csae.factors import Gradients, Trace
from csae.forward_pass import Pass
from csae.given import check_acts, check_bounds, check_dead, check_target, check_trained
from csae.losses import added, energy, unexplained
from csae.matryoshka import checked_prefixes, prefix_fvus
from csae.ops.activity import fired
from csae.ops.checks import check_k
from csae.ops.linear import linear
from csae.ops.scaling import over_scale
from csae.outputs import Code, Losses, Output, Ran, Sweeps
from csae.saving import Saved, shapes, without_tensors
from csae.selection import least, slots
from csae.tables import TABLES, random_directions, rows_here

if TYPE_CHECKING:
    from csae.data.activations import Batch
    from csae.distributed.shard import Shard

# The length of the rows of W_enc of a new transcoder. What a feature reads and what it writes do not fit yet, so its
# code is noise to the target; rows of length one make so much of it that training silences features for good. On
# SmolLM2's MLP 11 (k = 16, 300 thousand tokens) TopK has an FVU of 0.475 with this, 0.499 with length one; with a skip
# connection 0.331 and 0.358; contextual with a skip connection 0.312 and 0.443, with 3.5 of 16 features left.
TRANSCODER_LENGTH = 0.1


class SAE(Saved, ABC):
    """Base of `TopKSAE` and `ContextualSAE`: W_enc, b_enc, W_dec, b_dec, and what is done with them.

    Activations are divided by `scale` on the way in, and results are multiplied by it on the way out. So in normalised
    units a dimension has a mean square of one. `initialise` sets the scale. Decoder rows start as random unit vectors,
    and the encoder as the decoder's transpose (Gao et al. 2024, arXiv 2406.04093).

    Dtypes: activations and weights may have any floating dtypes. Activations are divided by `scale` in float32 or
    wider. Arithmetic is in the dtype of the weights. x_hat and c come in the dtype of the activations; a code's values
    and what `decode` gives, in that of the weights; losses in float32 or wider. Under torch.autocast products are in
    its dtype, and results as without it. The exact form of a contextual SAE, and what is made of it (`stream`,
    `csae.attribution`), ignore autocast: one rounding could lead the recurrence elsewhere.

    A transcoder predicts other activations than those it reads, the target: with `d_out`, also where that equals d_in.
    Its mean and its scale are the input's, and b_dec, W_dec and `target_scale` belong to the target:

        code  = relu(topk(W_enc (x - mean) + b_enc, k))
        x_hat = sum_i code.values_i * W_dec[code.indices_i] + b_dec + W_skip (x - mean)       W_skip if skip=True

    The skip connection is that of Paulo et al. 2025 (arXiv 2501.18823), and starts at zero. The mean is a constant:
    b_enc and b_dec can make up for any other. `loss` and `gradients` take the target, and the FVU is of it.

    A parameter with requires_grad=False is frozen: it gets no gradient, and stays as it is.

    An argument may be changed later (`sae.k = 8`): it is checked again, and saved as changed. One that a parameter's
    shape depends on is refused then.

    Args:
        d_in: width of the activations.
        d_sae: number of features.
        k: active features a token.
        k_aux: how many dead features reconstruct the residual (AuxK); if not given, half the width of the
            reconstruction, as Gao et al. advise.
        aux_coef: weight of that loss; 1/32 in Gao et al.
        dead_after: a feature is dead when it has not fired for this many tokens.
        d_out: width of a transcoder's target; None for an autoencoder.
        skip: whether a transcoder has a skip connection.
        selection: which features a code has (`csae.selection`): "topk", k for each token; "batch" and "jumprelu", k on
            average, by a threshold in use.
        k_max: slots of a code, the most features that a token can have; k with "topk", min(d_sae, 4 * k) otherwise.
        l0_coef: with "jumprelu", the weight of (L0 / k - 1)^2 in the loss.
        bandwidth: with "jumprelu", how near to its threshold a pre-activation says something about the threshold's
            gradient, in normalised units: less than half of this away.
        prefixes: ascending numbers of features: the features below each are trained to rebuild alone too, as in a
            Matryoshka SAE (`csae.matryoshka`).
    """

    look_back: tuple[str, ...] = ()
    """names of the parameters of the look-back, which train at a learning rate of their own"""

    shard: Shard | None = None
    """which rows of the tables are here, and who has the others (`csae.distributed`); None: all are here"""

    W_enc: nn.Parameter
    """[d_sae, d_in]"""
    b_enc: nn.Parameter
    """[d_sae]"""
    W_dec: nn.Parameter
    """[d_sae, d_out], a unit row a feature"""
    b_dec: nn.Parameter
    """[d_out]"""
    W_skip: nn.Parameter | None
    """[d_out, d_in]: a transcoder's skip connection"""
    scale: Tensor
    """scalar: activations are divided by it"""
    mean: Tensor | None
    """[d_in], of a transcoder: what is subtracted from normalised activations"""
    target_scale: Tensor | None
    """scalar, of a transcoder: its results are multiplied by it, where an autoencoder's are by `scale`"""
    tokens_since_fired: Tensor
    """[d_sae] int64: how many training tokens ago each feature was last active"""
    threshold: Tensor | None
    """what a pre-activation has to exceed, in normalised units. Of "batch" a scalar, float32 or wider: in training the
    least value of the last batch (`track`), then what `calibrate` finds. Of "jumprelu" a parameter [d_sae]. None with
    "topk" """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        k_aux: int | None = None,
        aux_coef: float = 1 / 32,
        dead_after: int = 10_000_000,
        d_out: int | None = None,
        skip: bool = False,
        selection: str = "topk",
        k_max: int | None = None,
        l0_coef: float = 1.0,
        bandwidth: float = 0.1,
        prefixes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        counts = {"d_in": d_in, "d_sae": d_sae, "k_aux": 1 if k_aux is None else k_aux, "dead_after": dead_after}
        counts["d_out"] = d_in if d_out is None else d_out
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name}: given {count!r}; needed a whole number")
            if count < 1:
                raise ValueError(f"{name}: given {count}; needed at least 1")
        check_k(k, d_sae)
        for name, coef in {"aux_coef": aux_coef, "l0_coef": l0_coef, "bandwidth": bandwidth}.items():
            if isinstance(coef, bool) or not isinstance(coef, int | float):
                raise TypeError(f"{name}: given {coef!r}; needed a number")
            if not 0 <= coef < math.inf:
                raise ValueError(f"{name}: given {coef}; needed a number of zero or more")
        if not isinstance(skip, bool):
            raise TypeError(f"skip: given {skip!r}; needed True or False")
        if skip and d_out is None:
            raise ValueError("skip: given True without d_out; needed a transcoder: an autoencoder would copy its input")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.d_out, self.skip = counts["d_out"], skip
        self.prefixes = checked_prefixes(prefixes, d_sae)
        self.k_aux = max(1, self.d_out // 2) if k_aux is None else k_aux
        self.aux_coef, self.dead_after = aux_coef, dead_after
        if selection == "jumprelu" and not bandwidth:
            raise ValueError("bandwidth: given 0; needed a number above 0")
        self.selection, self.k_max = selection, slots(selection, k, k_max, d_sae)
        self.l0_coef, self.bandwidth = l0_coef, bandwidth
        rows = rows_here(d_sae).stop - rows_here(d_sae).start  # len() takes no number that is far too large
        directions = random_directions(d_sae, self.d_out)
        self.W_dec = nn.Parameter(directions)
        W_enc = directions.clone() if d_out is None else random_directions(d_sae, d_in).mul_(TRANSCODER_LENGTH)
        self.W_enc = nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(torch.zeros(rows))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(self.d_out, d_in)) if skip else None)
        if selection == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(rows))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("tokens_since_fired", torch.zeros(rows, dtype=torch.int64))
        # Those that may be None come last: torch.export counts them with the others.
        self.register_buffer("mean", None if d_out is None else torch.zeros(d_in))
        self.register_buffer("target_scale", None if d_out is None else torch.ones(()))
        if selection != "jumprelu":
            self.register_buffer("threshold", torch.zeros(()) if selection == "batch" else None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._arguments or name not in vars(self):
            super().__setattr__(name, value)
            return
        # An argument is changed after construction: check it, and save it, as if it had been given there.
        changed = self._arguments | {name: value}
        made = without_tensors(type(self), changed)
        if shapes(made) != shapes(self if self.shard is None else without_tensors(type(self), self._arguments)):
            raise ValueError(
                f"{name}: given {value}; needed {self._arguments[name]}, as the parameters have: make another"
            )
        vars(self).update({of: vars(made)[of] for of in changed if of in vars(made)})
        self._hub_mixin_config = changed

    def forward(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Output:
        """acts [..., d_in] -> `Output`, in their units. For a per-token SAE mask and documents change nothing in use.

        In training mode codes are selected as in training (`csae.selection`).

        mask: acts.shape[:-1] bool, True where a position takes part.
        documents: acts.shape[:-1] integer; a document is a run of equal ids.
        """
        self._check_whole("forward")
        self._check_acts(acts, mask, documents)
        found = self._run(Pass(self, self.training), self._normalised(acts), mask, documents, None)
        return self._output(found.x_hat, found.code, found.c, acts.dtype)

    @abstractmethod
    def _run(self, ops: Pass, x: Tensor, mask: Tensor | None, documents: Tensor | None, sweeps: Sweeps | None) -> Ran:
        """Normalised x [..., d_in] -> what becomes of it, as training runs it, by these ops."""

    def _output(self, x_hat: Tensor, code: Code, c: Tensor, dtype: torch.dtype) -> Output:
        """`Output` in the units of what is reconstructed and in this dtype, from what is in normalised units."""
        code = Code(code.values.to(self.W_enc.dtype), code.indices)
        return Output(self._in_units_of(x_hat, dtype), code, self._in_units_of(c, dtype))

    @property
    def masking(self) -> tuple[bool, bool]:
        """keep_first and bos for `csae.data.activations.sink_mask`, as they were in training."""
        on = self.trained_on
        return on is not None and bool(on.keep_first), on is not None and bool(on.bos)

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts other activations than those it reads."""
        return self.target_scale is not None

    @property
    def centre(self) -> Tensor:
        """[d_in]: what is subtracted from normalised activations first: b_dec, or a transcoder's mean."""
        return self.b_dec if self.mean is None else self.mean

    @property
    def out_scale(self) -> Tensor:
        """Scalar: what normalised reconstructions are multiplied by."""
        return self.scale if self.target_scale is None else self.target_scale

    @property
    def n_params(self) -> int:
        """Number of trained parameters, those of other processes included."""
        return sum(
            of.shape[1:].numel() * self.d_sae if name in TABLES else of.numel() for name, of in self.named_parameters()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name in ("scale", "target_scale"):
            old = getattr(self, name)
            new = old if old is None else fn(old)
            if new is not None and new.dtype != old.dtype and not new.is_meta and not 0 < float(new) < math.inf:
                raise ValueError(f"{name}: {float(old):g} does not fit {new.dtype}; needed a wider dtype: bfloat16")
        above = self.threshold if self.selection == "batch" else None
        super()._apply(fn, recurse)
        if above is not None and self.threshold is not None and self.threshold.dtype.itemsize < 4:
            self.threshold = above.to(self.threshold.device)  # rounded, it would be another number of features
        return self

    @torch.no_grad()
    def initialise(
        self, mean: Tensor, scale: float, target_mean: Tensor | None = None, target_scale: float | None = None
    ) -> None:
        """Take the data's mean [d_in] and scale: activations minus mean, over scale, have mean square one.

        A transcoder needs those of its target too, [d_out] and a number.
        """
        if (target_mean is not None, target_scale is not None) != (self.is_transcoder,) * 2:
            needed = "those of the target" if self.is_transcoder else "None: this is no transcoder (it has no d_out)"
            raise ValueError(
                f"target_mean, target_scale: {_given(target_mean)} and {_given(target_scale)}; needed {needed}"
            )
        for prefix, width, of, size in (("", "d_in", mean, scale), ("target_", "d_out", target_mean, target_scale)):
            if of is None or size is None:
                continue
            if tuple(of.shape) != (getattr(self, width),):
                raise ValueError(
                    f"{prefix}mean: given shape {list(of.shape)}; needed [{width}] = [{getattr(self, width)}]"
                )
            if not 0 < size < math.inf:
                raise ValueError(f"{prefix}scale: given {size}; needed a positive finite number")
        self.scale.fill_(scale)
        if self.mean is None or self.target_scale is None or target_mean is None or target_scale is None:
            self.b_dec.copy_(mean / scale)
        else:
            self.mean.copy_(mean / scale)
            self.target_scale.fill_(target_scale)
            self.b_dec.copy_(target_mean / target_scale)

    def loss(
        self,
        acts: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        dead: Tensor | Dead | None = None,
        sweeps: Sweeps | None = None,
        target: Tensor | None = None,
    ) -> Losses:
        """The training loss: fraction of variance unexplained (the mean over prefixes), plus AuxK for dead features.

        With selection="jumprelu" also l0_coef * (L0 / k - 1)^2, L0 being the mean number of active features. Thresholds
        get the straight-through gradient of Rajamanoharan et al. 2024 (arXiv 2407.14435), with a rectangle as kernel.

        Args:
            acts: [..., d_in] activations ([B, T, d_in] for a contextual SAE).
            mask: acts.shape[:-1] bool, True where a position counts.
            documents: [B, T] integer, a document is a run of equal ids; used by a contextual SAE.
            dead: [n_dead] int64, the dead features (`dead_features()`), or None for no AuxK. A captured step gives them
                padded, as `csae.dead_rows.Dead`.
            sweeps: how a contextual SAE runs; by its own `sweeps` if not given.
            target: [..., d_out], what a transcoder is to predict, and its loss is of; None for an autoencoder.
        """
        self._check_whole("loss")
        self._check_acts(acts, mask, documents)
        check_target(self, acts, target)
        check_dead(self, dead)
        ops = Pass(self, training=True, prefixes=self.prefixes)
        return self._losses(ops, acts, mask, documents, dead, sweeps, target)

    def gradients(
        self,
        acts: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        dead: Tensor | Dead | None = None,
        sweeps: Sweeps | None = None,
        target: Tensor | None = None,
    ) -> tuple[Losses, Gradients]:
        """The training loss and its gradient by every parameter, those of the tables in factors (`csae.factors`).

        It is what `loss(...)` and `loss.backward()` give, without a tensor of a table's size; `csae.adam.Adam.update`
        takes it. Args: as `loss`. The losses are without a graph. A frozen parameter has no entry.

        Raises ValueError where all are frozen, or where two names are one parameter: `loss` takes those.
        """
        if torch.compiler.is_compiling():
            if not _traces_autograd():
                return _out_of_graph(SAE.gradients, self, acts, mask, documents, dead, sweeps, target)
        elif torch.is_inference_mode_enabled():
            raise RuntimeError("gradients: called under torch.inference_mode(); needed outside of it")
        self._check_acts(acts, mask, documents)
        check_target(self, acts, target)
        check_dead(self, dead)
        trace = self._trace(check_trained(self))
        with torch.enable_grad():
            losses = self._losses(trace, acts, mask, documents, dead, sweeps, target)
            with torch.autocast(acts.device.type, enabled=False):  # it is for the forward pass
                gradients = trace.gradients(losses.loss)
        code = Code(losses.code.values.detach(), losses.code.indices)
        return Losses(losses.loss.detach(), losses.fvu.detach(), losses.aux.detach(), code), gradients

    def _losses(
        self,
        ops: Pass,
        acts: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        dead: Tensor | Dead | None,
        sweeps: Sweeps | None,
        target: Tensor | None,
    ) -> Losses:
        dtype = self.W_enc.dtype
        x = over_scale(acts, self.scale, mask, dtype)
        y = x if target is None else over_scale(target, self.out_scale, mask, dtype)
        parts, code, _, suppressed, groups = self._run(ops, x, mask, documents, sweeps)
        ones = torch.promote_types(x.dtype, torch.float32)  # half precision can't count tokens
        weight = x.new_ones(x.shape[:-1], dtype=ones) if mask is None else mask.to(ones)
        if groups is not None:
            residual = y - added(parts)
            fvus = prefix_fvus(y, residual, groups, weight, ops.total)
            fvu, loss = fvus[-1], fvus.mean()
        else:
            fvu, residual = unexplained(y, parts, weight, ops.total)
            loss = fvu
        aux = fvu.new_zeros(())
        among = Dead(dead) if isinstance(dead, Tensor) else dead
        if among is not None and ops.n_dead(among) > 0:
            seen = x - self.centre - suppressed  # by the encoder, in its order of rounding
            aux = self._aux(ops, seen.detach(), residual.detach(), mask, weight, among)
            loss = loss + self.aux_coef * aux
        if self.selection == "jumprelu":
            active, tokens = ops.total(torch.stack([(ops.active(code) * weight).sum(), weight.sum()]))
            loss = loss + self.l0_coef * (active / tokens.clamp_min(1) / self.k - 1).square()
        return Losses(loss, fvu, aux, code)

    def _aux(self, ops: Pass, x: Tensor, residual: Tensor, mask: Tensor | None, weight: Tensor, dead: Dead) -> Tensor:
        """AuxK (Gao et al. 2024, section A.2): the residual rebuilt by the most active dead features.

        x [..., d_in] is what the encoder saw. Only the dead rows are multiplied: the cost grows with their number,
        not with d_sae. Only they get a gradient: its graph shares nothing with that of the fvu.
        """
        n_dead = ops.n_dead(dead)
        rebuilt = ops.rebuild(x, dead, min(self.k_aux, n_dead), mask)
        left, before = ops.total(torch.stack([energy(residual - rebuilt, weight), energy(residual, weight)]))
        return dead.share(self.k_aux, n_dead, left.dtype) * left / before.clamp_min(1e-12)

    def _trace(self, trained: Collection[str], training: bool = True) -> Trace:
        """The pass that gives gradients in factors."""
        return Trace(self, trained, training) if self.shard is None else self.shard.trace(self, trained, training)

    def _check_whole(self, what: str) -> None:
        """Raise UserError where only some rows are here: `what` would need all."""
        if self.shard is not None:
            rows = self.shard.rows
            raise UserError(
                f"{what}: this process has {len(rows)} of {self.d_sae} features, the other ranks have the rest; needed "
                "a whole SAE: save it (save_pretrained on all ranks), and load it in one process (from_pretrained)"
            )

    def _skipped(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the skip connection, if there is one, adds [..., d_out] for normalised x [..., d_in] less `centre`."""
        return () if self.W_skip is None else (linear(x, self.W_skip),)

    def _skip_of(self, x_hat: Tensor, acts: Tensor | None) -> Tensor:
        """x_hat with `_skipped`, for `decode`, which may be given the activations [..., d_in]."""
        if self.W_skip is None:
            return x_hat
        if acts is None:
            raise ValueError(
                "acts: not given; needed the activations that were encoded: the skip connection reads them"
            )
        self._check_acts(acts)
        if acts.shape[:-1] != x_hat.shape[:-1]:
            raise ValueError(f"acts: given shape {list(acts.shape)}; needed {[*x_hat.shape[:-1], self.d_in]}")
        return added((x_hat, *self._skipped(self._normalised(acts) - self.centre)))

    def _normalised(self, acts: Tensor) -> Tensor:
        """Activations in normalised units: over the scale, in the dtype of the weights."""
        return over_scale(acts, self.scale, None, self.W_enc.dtype)

    def _in_units_of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalised x [..., d_out] -> the same in the units of what is reconstructed, in this dtype."""
        wide = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
        return (x.to(wide) * self.out_scale.to(wide)).to(dtype)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove the part of W_dec's gradient that would only change the length of its unit rows; not if frozen."""
        if self.W_dec.grad is not None and self.W_dec.requires_grad:
            along = torch.bmm(self.W_dec.grad.unsqueeze(1), self.W_dec.unsqueeze(2)).squeeze(2)  # [d_sae, 1]
            self.W_dec.grad.addcmul_(self.W_dec, along, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give the decoder's rows unit norm, unless it is frozen."""
        if self.W_dec.requires_grad:
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def track(self, code: Code, mask: Tensor | None = None) -> None:
        """Count for each feature the tokens since it last fired. mask: code.values.shape[:-1] bool.

        With selection="batch" the threshold becomes the least value of this code, of a batch of training.

        Where others own rows too, all processes call this, each with the code of its own windows.
        """
        check_bounds(code.values.shape[:-1], mask, None)
        tokens: int | Tensor = code.values.shape[:-1].numel() if mask is None else mask.sum()
        if self.shard is None:
            fired(self.tokens_since_fired.add_(tokens), *code, mask)
        else:
            active = ~(code.values <= 0)  # NaN is active, as in `fired`
            active = active if mask is None else active & mask.unsqueeze(-1)
            of_rows, tokens = self.shard.fired(code.indices, active, tokens)
            self.tokens_since_fired.add_(tokens).mul_(1 - of_rows)
        if self.selection == "batch" and self.threshold is not None:
            value = least(code, mask)
            value = value if self.shard is None else self.shard.least(value)
            self.threshold.copy_(torch.where(value.isfinite(), value, self.threshold))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Batch]) -> float:
        """Set the threshold so that a token of this sample has k features on average, in use; gives that average.

        A contextual SAE is run in its exact form. A threshold a feature ("jumprelu") is moved by as much for all. The
        average is within 0.2% of k, or as near as it can come: where the sample has fewer positive pre-activations
        than that, or is so small that one feature more changes it by more.

        batches: windows as `csae.data.activations.Batch` has them, some tens of thousands of tokens: the mean of fewer
        differs from that of others by more than a percent. Where others own rows too, all processes call this, each
        with as many batches of its own.

        Raises UserError with selection="topk", which has no threshold, where no position is in the mask, and where a
        code of the sample, or the threshold, is not finite.
        """
        return calibrate(self, batches)

    @torch.no_grad()
    def code_in_use(self, acts: Tensor, mask: Tensor | None, documents: Tensor | None) -> Code:
        """The code of acts [B, T, d_in] as it is in use, by the exact form of a contextual SAE; no gradient.

        Also where others own rows too: all processes call it, each with as many windows of its own.
        """
        self._check_acts(acts, mask, documents)
        values, indices = self._trace((), training=False).encoder(mask)(self._normalised(acts) - self.centre)
        return Code(values.to(self.W_enc.dtype), indices)

    def dead_features(self) -> Tensor:
        """[n_dead] int64: the features that have not fired for `dead_after` training tokens; the first here is 0."""
        return (self.tokens_since_fired >= self.dead_after).nonzero().squeeze(1)

    def _check_acts(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> None:
        check_acts(self, acts, mask, documents)


@torch.compiler.assume_constant_result
def _traces_autograd() -> bool:
    """Whether a call of torch.autograd.grad is part of a compiler's graph, and does not cut it in two."""
    return bool(getattr(torch._dynamo.config, "trace_autograd_ops", False))


@torch.compiler.disable  # a graph break cuts autograd: the second graph would see none of the first one's tensors
def _out_of_graph(function: Callable[..., Any], *given: Any) -> Any:
    return function(*given)


def _given(value: object) -> str:
    return "not given" if value is None else "given"
