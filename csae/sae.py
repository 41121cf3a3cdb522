"""What both SAEs share, as autoencoder and as transcoder: parameters, loss, unit-norm decoder, dead features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from csae.factors import Gradients, Pass, Trace
from csae.ops.checks import FLOATS, INTEGERS, check_device, check_k, check_tensor
from csae.ops.linear import linear
from csae.outputs import Code, Losses, Output, Ran, Sweeps
from csae.saving import Saved, shapes, without_tensors


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
    """

    look_back: tuple[str, ...] = ()
    """names of the parameters of the look-back, which train at a learning rate of their own"""

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
        if isinstance(aux_coef, bool) or not isinstance(aux_coef, int | float):
            raise TypeError(f"aux_coef: given {aux_coef!r}; needed a number")
        if not 0 <= aux_coef < math.inf:
            raise ValueError(f"aux_coef: given {aux_coef}; needed a number of zero or more")
        if not isinstance(skip, bool):
            raise TypeError(f"skip: given {skip!r}; needed True or False")
        if skip and d_out is None:
            raise ValueError("skip: given True without d_out; needed a transcoder: an autoencoder would copy its input")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.d_out, self.skip = counts["d_out"], skip
        self.k_aux = max(1, self.d_out // 2) if k_aux is None else k_aux
        self.aux_coef, self.dead_after = aux_coef, dead_after
        directions = _unit_rows(d_sae, self.d_out)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone() if d_out is None else _unit_rows(d_sae, d_in))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(self.d_out, d_in)) if skip else None)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        # Those that may be None come last: torch.export counts them with the others.
        self.register_buffer("mean", None if d_out is None else torch.zeros(d_in))
        self.register_buffer("target_scale", None if d_out is None else torch.ones(()))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._arguments or name not in vars(self):
            super().__setattr__(name, value)
            return
        # An argument is changed after construction: check it, and save it, as if it had been given there.
        changed = self._arguments | {name: value}
        made = without_tensors(type(self), changed)
        if shapes(made) != shapes(self):
            raise ValueError(
                f"{name}: given {value}; needed {self._arguments[name]}, as the parameters have: make another"
            )
        vars(self).update({of: vars(made)[of] for of in changed if of in vars(made)})
        self._hub_mixin_config = changed

    def forward(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Output:
        """acts [..., d_in] -> `Output`, in their units. For a per-token SAE mask and documents change nothing.

        mask: acts.shape[:-1] bool, True where a position takes part.
        documents: acts.shape[:-1] integer; a document is a run of equal ids.
        """
        self._check_acts(acts, mask, documents)
        x_hat, code, c, _ = self._run(Pass(self), self._normalised(acts), mask, documents, None)
        return self._output(x_hat, code, c, acts.dtype)

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
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name in ("scale", "target_scale"):
            old = getattr(self, name)
            new = old if old is None else fn(old)
            if new is not None and new.dtype != old.dtype and not new.is_meta and not 0 < float(new) < math.inf:
                raise ValueError(f"{name}: {float(old):g} does not fit {new.dtype}; needed a wider dtype: bfloat16")
        return super()._apply(fn, recurse)

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
        dead: Tensor | None = None,
        sweeps: Sweeps | None = None,
        target: Tensor | None = None,
    ) -> Losses:
        """The training loss: fraction of variance unexplained, plus AuxK for dead features.

        Args:
            acts: [..., d_in] activations ([B, T, d_in] for a contextual SAE).
            mask: acts.shape[:-1] bool, True where a position counts.
            documents: [B, T] integer, a document is a run of equal ids; used by a contextual SAE.
            dead: [n_dead] int64, the dead features (`dead_features()`), or None for no AuxK.
            sweeps: how a contextual SAE runs; by its own `sweeps` if not given.
            target: [..., d_out], what a transcoder is to predict, and its loss is of; None for an autoencoder.
        """
        self._check_acts(acts, mask, documents)
        self._check_target(acts, target)
        self._check_dead(dead)
        return self._losses(Pass(self), acts, mask, documents, dead, sweeps, target)

    def gradients(
        self,
        acts: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        dead: Tensor | None = None,
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
        self._check_target(acts, target)
        self._check_dead(dead)
        trace = Trace(self, check_trained(self))
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
        dead: Tensor | None,
        sweeps: Sweeps | None,
        target: Tensor | None,
    ) -> Losses:
        x = self._normalised(acts)
        y = x if target is None else self._over(target, self.out_scale)
        if mask is not None:  # what is left out may be NaN, or too large for its dtype
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
            y = x if target is None else y.masked_fill(~mask.unsqueeze(-1), 0)
        x_hat, code, _, suppressed = self._run(ops, x, mask, documents, sweeps)
        ones = torch.promote_types(x.dtype, torch.float32)  # half precision can't count tokens
        weight = x.new_ones(x.shape[:-1], dtype=ones) if mask is None else mask.to(ones)
        residual = y - x_hat
        fvu = fraction_unexplained(y, residual, weight)
        aux = fvu.new_zeros(())
        if dead is not None and dead.numel() > 0:
            aux = self._aux(ops, (x - suppressed - self.centre).detach(), residual.detach(), mask, weight, dead)
        return Losses(fvu + self.aux_coef * aux, fvu, aux, code)

    def _aux(self, ops: Pass, x: Tensor, residual: Tensor, mask: Tensor | None, weight: Tensor, dead: Tensor) -> Tensor:
        """AuxK (Gao et al. 2024, section A.2): the residual rebuilt by the most active dead features.

        x [..., d_in] is what the encoder saw. Only the dead rows are multiplied: the cost grows with their number,
        not with d_sae. Only they get a gradient: its graph shares nothing with that of the fvu.
        """
        k = min(self.k_aux, dead.numel())
        residual_hat = ops.decode("W_dec", ops.encode_dead(x, dead, k, mask), features=dead)
        share = k / self.k_aux  # a few dead features can't be asked for as much as many
        return share * _energy(residual - residual_hat, weight) / _energy(residual, weight).clamp_min(1e-12)

    def _with_skip(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat [..., d_out] with what the skip connection makes of normalised x [..., d_in] less `centre`."""
        return x_hat if self.W_skip is None else x_hat + linear(x, self.W_skip)

    def _skip_of(self, x_hat: Tensor, acts: Tensor | None) -> Tensor:
        """`_with_skip` for `decode`, which may be given the activations [..., d_in]."""
        if self.W_skip is None:
            return x_hat
        if acts is None:
            raise ValueError(
                "acts: not given; needed the activations that were encoded: the skip connection reads them"
            )
        self._check_acts(acts)
        if acts.shape[:-1] != x_hat.shape[:-1]:
            raise ValueError(f"acts: given shape {list(acts.shape)}; needed {[*x_hat.shape[:-1], self.d_in]}")
        return self._with_skip(x_hat, self._normalised(acts) - self.centre)

    def _normalised(self, acts: Tensor) -> Tensor:
        """Activations in normalised units: over the scale, in the dtype of the weights."""
        return self._over(acts, self.scale)

    def _over(self, acts: Tensor, scale: Tensor) -> Tensor:
        weights = self.W_enc.dtype
        wide = torch.promote_types(torch.promote_types(acts.dtype, weights), torch.float32)
        return (acts.to(wide) / scale.to(wide)).to(weights)

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
        """Count for each feature the tokens since it last fired. mask: code.values.shape[:-1] bool."""
        check_bounds(code.values.shape[:-1], mask, None)
        active = code.values > 0
        if mask is not None:
            active = active & mask.unsqueeze(-1)
        fired = torch.zeros(self.d_sae, dtype=torch.int32, device=active.device)
        fired.scatter_reduce_(0, code.indices.flatten(), active.flatten().to(torch.int32), "amax")
        tokens = code.values.shape[:-1].numel() if mask is None else mask.sum()
        self.tokens_since_fired.add_(tokens).mul_(1 - fired)

    def dead_features(self) -> Tensor:
        """[n_dead] int64: the features that have not fired for `dead_after` training tokens."""
        return (self.tokens_since_fired >= self.dead_after).nonzero().squeeze(1)

    def _check_acts(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> None:
        if not isinstance(acts, Tensor):
            raise TypeError(f"acts: given a {type(acts).__name__}; needed a torch.Tensor")
        if acts.dim() == 0 or acts.shape[-1] != self.d_in:
            raise ValueError(f"acts: given shape {list(acts.shape)}; needed [..., d_in] with d_in = {self.d_in}")
        if acts.dtype not in FLOATS:
            raise TypeError(f"acts: given dtype {acts.dtype}; needed a floating dtype of 16 to 64 bits")
        check_device("acts", acts, "the SAE", self.W_enc)
        check_bounds(acts.shape[:-1], mask, documents)
        for name, tensor in (("mask", mask), ("documents", documents)):
            if tensor is not None:
                check_device(name, tensor, "acts", acts)

    def _check_target(self, acts: Tensor, target: Tensor | None) -> None:
        if not self.is_transcoder:
            if target is not None:
                raise ValueError("target: given one; needed None: this is no transcoder (it has no d_out)")
            return
        if target is None:
            raise ValueError("target: not given; needed [..., d_out], the activations that the transcoder predicts")
        check_tensor("target", target)
        if target.shape != (*acts.shape[:-1], self.d_out):
            raise ValueError(
                f"target: given shape {list(target.shape)}; needed {[*acts.shape[:-1], self.d_out]}, as acts is, with "
                f"d_out = {self.d_out}"
            )
        if target.dtype not in FLOATS:
            raise TypeError(f"target: given dtype {target.dtype}; needed a floating dtype of 16 to 64 bits")
        check_device("target", target, "acts", acts)

    def _check_dead(self, dead: Tensor | None) -> None:
        if dead is None:
            return
        check_tensor("dead", dead)
        if dead.dtype not in (torch.int64, torch.int32) or dead.dim() != 1:
            raise TypeError(
                f"dead: given dtype {dead.dtype}, shape {list(dead.shape)}; needed [n_dead] int64, numbers of features "
                "as dead_features() gives them"
            )
        if dead.device.type != "cpu" or dead.numel() == 0 or torch.compiler.is_compiling():
            return  # the lookup itself fails there, where a number is out of range
        numbers = dead.numpy()
        least, most = int(numbers.min()), int(numbers.max())
        if least < 0 or most >= self.d_sae:
            raise ValueError(f"dead: given {least} to {most}; needed 0 <= feature < d_sae = {self.d_sae}")


@torch.compiler.assume_constant_result
def _traces_autograd() -> bool:
    """Whether a call of torch.autograd.grad is part of a compiler's graph, and does not cut it in two."""
    return bool(getattr(torch._dynamo.config, "trace_autograd_ops", False))


@torch.compiler.disable  # a graph break cuts autograd: the second graph would see none of the first one's tensors
def _out_of_graph(function: Callable[..., Any], *given: Any) -> Any:
    return function(*given)


def check_bounds(positions: torch.Size, mask: Tensor | None, documents: Tensor | None) -> None:
    """Raise ValueError or TypeError where the mask or the documents are not an entry for each of the positions."""
    for name, tensor in (("mask", mask), ("documents", documents)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: given a {type(tensor).__name__}; needed a torch.Tensor, or None")
        if tensor is not None and tensor.shape != positions:
            raise ValueError(
                f"{name}: given shape {list(tensor.shape)}; needed one entry a position, {list(positions)}"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: given dtype {mask.dtype}; needed torch.bool, True where a position takes part")
    if documents is not None and documents.dtype not in INTEGERS:
        raise TypeError(f"documents: given dtype {documents.dtype}; needed integer ids, such as torch.int64")


def check_trained(sae: SAE) -> set[str]:
    """The names of the parameters that are not frozen; ValueError where there is none, or where two are one."""
    named = list(sae.named_parameters(remove_duplicate=False))
    names = {name for name, _ in named}
    twice: list[str] = []
    if len({id(parameter) for _, parameter in named}) < len(named):
        twice = sorted(names - {name for name, _ in sae.named_parameters()})
    if twice:
        raise ValueError(
            f"sae: {', '.join(twice)} is another name of a parameter; needed one for each name: tied parameters train "
            "by loss(...).loss.backward()"
        )
    own = {"W_enc", "b_enc", "W_dec", "b_dec", *sae.look_back} | ({"W_skip"} if sae.skip else set())
    foreign = sorted(own - names)
    if foreign:
        raise ValueError(
            f"sae: {', '.join(foreign)} is computed from something else; needed a parameter: such an SAE trains by "
            "loss(...).loss.backward()"
        )
    trained = {name for name, parameter in named if parameter.requires_grad}
    if not trained:
        raise ValueError("sae: all of its parameters are frozen; needed one with requires_grad=True to train")
    return trained


def _unit_rows(n: int, d: int) -> Tensor:
    """[n, d]: random directions."""
    rows = torch.randn(n, d)
    return rows.div_(rows.norm(dim=1, keepdim=True))


def _given(value: object) -> str:
    return "not given" if value is None else "given"


def _energy(x: Tensor, weight: Tensor) -> Tensor:
    """Sum of squares of x [..., d_in], each position by its weight [...]; in weight's dtype, if that is wider."""
    x = x.to(torch.promote_types(x.dtype, weight.dtype))
    return (x.square().sum(dim=-1) * weight).sum()


def fraction_unexplained(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """FVU, a scalar: x and what is missed of it [..., d_in], each position by its weight [...]."""
    return _energy(residual, weight) / _energy(x - _mean(x, weight), weight)


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean [d_in] of x [..., d_in] over its positions, by weight [...]."""
    return (x * weight.unsqueeze(-1)).flatten(0, -2).sum(dim=0) / weight.sum().clamp_min(1)
