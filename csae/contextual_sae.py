"""ContextualSAE: looks back, and encodes only what is new."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from csae.factors import Trace
from csae.ops import lookback_attention, sparse_decode
from csae.ops.checks import check_tensor
from csae.ops.heads import VALUE_BOUND, bounded_heads, unit_heads, value_scale
from csae.ops.linear import linear
from csae.ops.lookback_attention import document_starts
from csae.ops.topk_encode import encode_again, encode_and_keep, encoder, with_encode_gradient
from csae.recurrence import State, advance, initial_state, whole
from csae.sae import SAE, Bounds, Code, Output, check_bounds

# The two queries, and the steepest slope that a head begins with. What predicts x_t from the past alone lies near;
# an exact FVU of 0.151 against 0.154 with a steepest slope of 1. With "current" it was 0.136 with 1, 0.137 with 3.
QUERIES = {"current": 1.0, "past": 6.0}
# A product of the look-back's width is narrow where it is this many times narrower than d_in.
NARROW = 4
# What `decode` takes for the mask and documents that it is not given.
AS_ENCODED = "as encoded"
# Pre-activations that are kept from one sweep to the next.
KEPT_BYTES = 256 << 20


class ContextualSAE(SAE):
    """An SAE whose encoder attends to the codes of earlier positions and suppresses what they account for.

        m_j    = sum_i code_j.values_i * W_mem[code_j.indices_i]
        q_t    = gain_h * unit(W_Q query_t),  k_j = unit(W_K m_j),  v_j = bounded(W_V m_j)          by head
        c_t    = W_O concat_h sum_{j<t} A_h(t, j) v_j
        code_t = relu(topk(W_enc (x_t - b_dec - c_t) + b_enc, k))
        x_hat  = sum_i code_t.values_i * W_dec[code_t.indices_i] + c_t + b_dec

    The code at each position holds only what is new there. It is a recurrence over positions; training runs
    it in parallel by sweeps (sweep 0 does not look back, each further one looks at the codes of the one
    before), evaluation runs it exactly.

    unit() gives a head's numbers a mean square of one, and bounded() one below VALUE_BOUND squared. So no score
    exceeds gain * sqrt(d_head), and c is no longer than sum_h |W_O_h| VALUE_BOUND sqrt(d_value) whatever the
    codes are: the recurrence can't diverge, on windows of any length (`c_bound`). Without them, training with
    query="past" diverged at a learning rate of 4e-3.

    Args: as `SAE`, and
        n_heads: heads of the look-back.
        d_head: width of a head's queries and keys.
        d_value: width of a head's values.
        d_memory: what a feature leaves in the memory, in numbers; keys and values are maps of it.
        k_mem: how many features of a code are remembered, the most active ones; all k if not given. Fewer make
            what is carried easier to read, at a price in FVU.
        query: "current": queries come from the activation itself, so that reconstruction needs the attention
            weights beside the codes. "past": from the reconstruction of the position before, so that the
            codes alone rebuild the whole window.
        sweeps: how often the parallel form looks back. Training takes fewer at first (`TrainConfig.early_sweeps`).
    """

    arch = "contextual"
    look_back = ("W_mem", "W_Q", "W_K", "W_V", "W_O", "gain", "slope", "null")

    from_exact = False
    """Whether the sweeps start at the exact codes, so that they give what running exactly does, with a gradient. What
    the exact codes are made of has none: it goes as far back as the sweeps do. `TrainConfig.exact_from` sets it."""

    W_mem: nn.Parameter
    """[d_sae, d_memory]"""
    W_Q: nn.Parameter
    """[n_heads * d_head, d_in]"""
    W_K: nn.Parameter
    """[n_heads * d_head, d_memory]"""
    W_V: nn.Parameter
    """[n_heads * d_value, d_memory]"""
    W_O: nn.Parameter
    """[d_in, n_heads * d_value]"""
    gain: nn.Parameter
    """[n_heads]: how sharply a head tells positions apart"""
    slope: nn.Parameter
    """[n_heads]: the price of log-distance"""
    null: nn.Parameter
    """[n_heads]: the score of looking at nothing"""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        n_heads: int = 8,
        d_head: int = 32,
        d_value: int = 64,
        d_memory: int = 256,
        k_mem: int | None = None,
        query: str = "current",
        sweeps: int = 3,
        k_aux: int | None = None,
        aux_coef: float = 1 / 32,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(d_in, d_sae, k, k_aux, aux_coef, dead_after)
        if query not in QUERIES:
            raise ValueError(f"query: given {query!r}; needed one of {', '.join(map(repr, QUERIES))}")
        sizes = {"n_heads": n_heads, "d_head": d_head, "d_value": d_value, "d_memory": d_memory}
        for name, count in (sizes | {"k_mem": k if k_mem is None else k_mem, "sweeps": sweeps}).items():
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name}: given {count!r}; needed a whole number")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: given {size}; needed at least 1")
        if k_mem is not None and not 1 <= k_mem <= k:
            raise ValueError(f"k_mem: given {k_mem}; needed 1 to k = {k}, or None for all")
        if sweeps < 0:
            raise ValueError(f"sweeps: given {sweeps}; needed 0 or more")
        self.n_heads, self.d_head, self.d_value, self.d_memory = n_heads, d_head, d_value, d_memory
        self.k_mem = k if k_mem is None else k_mem
        self.query, self.sweeps = query, sweeps
        # A code of k features has a squared norm near d_in in normalised units: this makes the memory and the
        # values start near unit variance, and W_O makes c start small against x.
        self.W_mem = nn.Parameter(torch.randn(d_sae, d_memory) / math.sqrt(d_in))
        self.W_Q = nn.Parameter(torch.randn(n_heads * d_head, d_in) / math.sqrt(d_in))
        self.W_K = nn.Parameter(torch.randn(n_heads * d_head, d_memory) / math.sqrt(d_memory))
        self.W_V = nn.Parameter(torch.randn(n_heads * d_value, d_memory) / math.sqrt(d_memory))
        self.W_O = nn.Parameter(0.1 * torch.randn(d_in, n_heads * d_value) / math.sqrt(n_heads * d_value))
        self.gain = nn.Parameter(torch.ones(n_heads))
        self.slope = nn.Parameter(torch.linspace(0, QUERIES[query], n_heads))
        self.null = nn.Parameter(torch.zeros(n_heads))

    @classmethod
    def shapes(
        cls,
        *,
        d_in: int,
        d_sae: int,
        n_heads: int = 8,
        d_head: int = 32,
        d_value: int = 64,
        d_memory: int = 256,
        **_: Any,
    ) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of an SAE that is made with these arguments."""
        memory = {
            "W_mem": (d_sae, d_memory),
            "W_Q": (n_heads * d_head, d_in),
            "W_K": (n_heads * d_head, d_memory),
            "W_V": (n_heads * d_value, d_memory),
            "W_O": (d_in, n_heads * d_value),
        }
        heads = dict.fromkeys(("gain", "slope", "null"), (n_heads,))
        return super().shapes(d_in=d_in, d_sae=d_sae) | memory | heads

    @torch.no_grad()
    def c_bound(self) -> float:
        """What the length of c, in the units of the activations, never exceeds."""
        heads = self.W_O.unflatten(-1, (self.n_heads, self.d_value)).unbind(1)  # [d_in, d_value] each
        written = sum(float(torch.linalg.matrix_norm(head.double(), 2)) for head in heads)
        return written * VALUE_BOUND * math.sqrt(self.d_value) * float(self.scale)

    def forward(
        self,
        acts: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        exact: bool | None = None,
    ) -> Output:
        """acts [B, T, d_in] -> `Output`.

        Args:
            mask: [B, T] bool, True where a position takes part. One that doesn't gets an empty code.
            documents: [B, T] integer; nothing is carried across the boundary of a run of equal ids.
            exact: the recurrence as it is defined (no gradient), or `sweeps` sweeps of it in parallel. If
                not given: sweeps in training mode, exact in evaluation mode.
        """
        self._check_acts(acts, mask, documents)
        exact = not self.training if exact is None else exact
        run = self._recur if exact else self._run
        return self._output(*run(self._normalised(acts), mask, documents), mask, documents, acts.dtype)

    def _output(
        self,
        x_hat: Tensor,
        code: Code,
        c: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        dtype: torch.dtype,
    ) -> Output:
        """`Output` of whole windows, from what is in normalised units."""
        code = Code.of_windows(code.values.to(self.W_enc.dtype), code.indices, mask, documents)
        return Output(self._in_units_of(x_hat, dtype), code, self._in_units_of(c, dtype))

    def encode(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Code:
        """acts [B, T, d_in] -> the code [B, T, k], exact in evaluation mode; see `forward`."""
        return self.forward(acts, mask, documents).code

    def decode(
        self,
        code: Code,
        c: Tensor | None = None,
        mask: Tensor | str | None = AS_ENCODED,
        documents: Tensor | str | None = AS_ENCODED,
    ) -> Tensor:
        """The code [B, T, k] -> the reconstruction [B, T, d_in], in the units of the activations.

        With query="past" the codes alone are enough: c is rebuilt from them, given the mask and documents [B, T] that
        they were encoded with. A code that `forward` or `encode` gave knows these (`Code.bounds`). Of another one, from
        a file for example, say them: None where there were none. With query="current" give the `c` of `Output`.

        Raises ValueError where what is needed is not known, or is not what the code was encoded with.
        """
        values, indices = code
        if values.dim() != 3:
            raise ValueError(f"code: given values of shape {list(values.shape)}; needed those of windows, [B, T, k]")
        if c is None:
            if self.query != "past":
                raise ValueError('c: not given; needed with query="current": pass the c that forward() returned')
            bounds = self._bounds(values.shape[:-1], getattr(code, "bounds", None), mask, documents)
            return self._in_units_of(self._recur(Code(values, indices), *bounds)[0], self.W_dec.dtype)
        check_tensor("c", c)
        if not c.is_floating_point():
            raise TypeError(f"c: given dtype {c.dtype}; needed a floating dtype, as forward() gives it")
        if c.shape != (*values.shape[:-1], self.d_in):
            raise ValueError(
                f"c: given shape {list(c.shape)}; needed {[*values.shape[:-1], self.d_in]}, as the code is"
            )
        alone = sparse_decode(values.to(self.W_dec.dtype), indices, self.W_dec) + self.b_dec
        wide = torch.promote_types(self.W_dec.dtype, torch.float32)
        return (self._in_units_of(alone, wide) + c).to(self.W_dec.dtype)

    def _bounds(
        self,
        positions: torch.Size,
        known: Bounds | None,
        mask: Tensor | str | None,
        documents: Tensor | str | None,
    ) -> Bounds:
        """The mask and documents that a code is decoded with."""
        if known is not None:
            check_bounds(positions, *known)
        found: list[Tensor | None] = []
        for name, given in (("mask", mask), ("documents", documents)):
            if not isinstance(given, str):
                found.append(given)
            elif known is not None:
                found.append(getattr(known, name))
            else:
                raise ValueError(
                    f"{name}: not given, and this code doesn't know; needed that which it was encoded with, or "
                    f"{name}=None if there was none (of whole windows: what a step gave is a piece)"
                )
        bounds = Bounds(*found)
        check_bounds(positions, *bounds)
        if known is not None and not (bounds.mask is known.mask and bounds.documents is known.documents):
            _check_same(known, bounds)
        return bounds

    def initial_state(self, B: int, look_back: int | None = None) -> State:
        """The state of B sequences before their first position, for `step`.

        look_back: how many positions a sequence remembers, and so its memory: 4 * n_heads * (d_head + d_value)
            bytes for each in float32. If not given, all of them, in a memory that grows.
        """
        for name, size in (("B", B), ("look_back", 1 if look_back is None else look_back)):
            if size < 1:
                raise ValueError(f"{name}: given {size}; needed at least 1")
        return initial_state(self, B, look_back or 256, bounded=look_back is not None)

    def step(
        self, acts: Tensor, state: State, mask: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Code, State]:
        """The next activations of B sequences -> their code, exactly as in `encode`, and the state after them.

        Any way of cutting a sequence into steps gives the same codes. A state and the one stepped from it share
        their memory: `state.clone()` to go on in two ways.

        Args:
            acts: [B, d_in], one position of each sequence, or [B, n, d_in], the next n.
            state: what `initial_state` or the last step gave.
            mask: [B] or [B, n] bool, True where a position takes part.
            documents: [B] or [B, n] integer; nothing is carried from one id to the next.

        Returns:
            the code, [B, k] or [B, n, k]; `stream` gives the reconstruction too.
        """
        output, state = self.stream(acts, state, mask, documents)
        return output.code, state

    def stream(
        self, acts: Tensor, state: State, mask: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Output, State]:
        """As `step`, with all of `Output`."""
        if isinstance(acts, Tensor) and acts.dim() == 2:
            check_bounds(acts.shape[:1], mask, documents)
            one = (None if tensor is None else tensor.unsqueeze(1) for tensor in (mask, documents))
            output, state = self.stream(acts.unsqueeze(1), state, *one)
            code = Code(output.code.values.squeeze(1), output.code.indices.squeeze(1))
            return Output(output.x_hat.squeeze(1), code, output.c.squeeze(1)), state
        self._check_acts(acts, mask, documents)
        x_hat, found, c, _, state = advance(self, self._normalised(acts), state, mask, documents)
        return Output(self._in_units_of(x_hat, acts.dtype), Code(*found), self._in_units_of(c, acts.dtype)), state

    def _run(
        self, x: Tensor, mask: Tensor | None, documents: Tensor | None, trace: Trace | None = None
    ) -> tuple[Tensor, Code, Tensor]:
        """x [B, T, d_in] in normalised units -> x_hat, code, c, by `sweeps` sweeps."""
        windows = self._windows_to_keep(x)
        if windows == 0:
            return self._sweep(x, mask, documents, trace, None)
        W_a = self.W_enc.detach() @ self.W_O.detach()
        parts = [
            self._sweep(
                x[start : start + windows],
                None if mask is None else mask[start : start + windows],
                None if documents is None else documents[start : start + windows],
                trace,
                W_a,
            )
            for start in range(0, x.shape[0], windows)
        ]
        x_hats, codes, cs = zip(*parts, strict=True)
        values, indices = zip(*codes, strict=True)
        return torch.cat(x_hats), Code(torch.cat(values), torch.cat(indices)), torch.cat(cs)

    def _windows_to_keep(self, x: Tensor) -> int:
        """How many windows at a time keep the pre-activations of sweep 0; none where it is no gain.

        c has rank n_heads * d_value, so a further sweep is a product of that width instead of d_in, and 8 bytes
        for each pre-activation that is kept: on an H100 as much as 2,000 operations, so it has to be narrow.
        """
        if self.sweeps == 0 or self.from_exact or NARROW * self.n_heads * self.d_value > self.d_in or x.numel() == 0:
            return 0
        return KEPT_BYTES // (4 * x.shape[1] * self.d_sae)

    def _sweep(
        self, x: Tensor, mask: Tensor | None, documents: Tensor | None, trace: Trace | None, W_a: Tensor | None
    ) -> tuple[Tensor, Code, Tensor]:
        """As `_run`; with W_a = W_enc W_O, [d_sae, n_heads * d_value], by narrow products after sweep 0."""
        start = self._exactly(x, mask, documents) if self.from_exact else None
        x = x - self.b_dec
        c = x.new_zeros(()).expand_as(x) if start is None else start.c
        given = x if trace is None else x.detach()
        kept = a = x.new_zeros(())
        queries = kept
        if self.query == "current":
            # Zero, and the only way from the queries to b_dec: one vector where the gradient of x would be a product.
            no_shift = (
                None
                if trace is None or not self.b_dec.requires_grad
                else linear(self.b_dec.detach() - self.b_dec, self.W_Q)
            )
            queries = self.queries(given, no_shift)
        encode = encoder(self.W_enc, self.b_enc, self.k)
        if start is not None:
            values, indices = start.code
        elif W_a is None:
            values, indices = encode(given)
        else:
            values, indices, kept = encode_and_keep(given, self.W_enc, self.b_enc, self.k)
        code = self._encoded(given if start is None else given - c, values, indices, mask, trace)
        for _ in range(self.sweeps):
            if self.query == "past":
                queries = self.queries(self._shifted(self._decoded(code, trace) + c))
            before, a = a, self._look_back(queries, code, mask, documents, trace)
            c = linear(a, self.W_O)
            left = given - c
            values, indices = encode(left) if W_a is None else encode_again(kept, a - before, W_a, self.k)
            code = self._encoded(left, values, indices, mask, trace)
        return self._decoded(code, trace) + c + self.b_dec, code, c

    def _encoded(self, x: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None, trace: Trace | None) -> Code:
        """The code of x [..., d_in], which is without b_dec and c, from what was found without a gradient.

        It is empty where the mask [...] is False.
        """
        if trace is None:
            values = with_encode_gradient(x, self.W_enc, self.b_enc, values, indices)
        else:
            values, indices = trace.encoded(x, values, indices, self.W_enc, self.b_enc, mask)
        return Code(values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0), indices)

    def _decoded(self, code: Code, trace: Trace | None) -> Tensor:
        """The code [..., k] -> the sum of its rows of W_dec."""
        return sparse_decode(*code, self.W_dec) if trace is None else trace.decode("W_dec", *code, self.W_dec)

    def remembered(self, code: Code, trace: Trace | None = None) -> Tensor:
        """The code [..., k] -> the sum of its rows of W_mem, [..., d_memory], of its k_mem most active features."""
        if trace is not None:
            return trace.decode("W_mem", *code, self.W_mem, most_active=self.k_mem if self.k_mem < self.k else None)
        return sparse_decode(code.values[..., : self.k_mem], code.indices[..., : self.k_mem], self.W_mem)

    def queries(self, query: Tensor, shift: Tensor | None = None) -> Tensor:
        """query [..., d_in] -> [..., n_heads, d_head]. shift [n_heads * d_head] is added before normalisation."""
        heads = linear(query, self.W_Q)
        if shift is not None:
            heads = heads + shift
        return unit_heads(heads.unflatten(-1, (self.n_heads, self.d_head)), self.gain)

    def _look_back(
        self, queries: Tensor, code: Code, mask: Tensor | None, documents: Tensor | None, trace: Trace | None
    ) -> Tensor:
        """queries, and the codes of all positions -> what is read there, [B, T, n_heads * d_value]."""
        keys, values = self.keys_values(self.remembered(code, trace))
        return lookback_attention(queries, keys, values, self.slope, self.null, mask, documents).flatten(-2)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory [..., d_memory] -> keys [..., n_heads, d_head], values [..., n_heads, d_value]."""
        keys = linear(memory, self.W_K).unflatten(-1, (self.n_heads, self.d_head))
        values = linear(memory, self.W_V).unflatten(-1, (self.n_heads, self.d_value))
        return unit_heads(keys), bounded_heads(values)

    def value_scale(self, memory: Tensor) -> Tensor:
        """memory [..., d_memory] -> [..., n_heads, 1]: what bounds the values of each head, 1 or less."""
        return value_scale(linear(memory, self.W_V).unflatten(-1, (self.n_heads, self.d_value)))

    @staticmethod
    def _shifted(x: Tensor) -> Tensor:
        """x [B, T, d] -> what was one position earlier; zero at position 0."""
        if x.shape[1] == 0:
            return x
        return nn.functional.pad(x[:, :-1], (0, 0, 1, 0))

    def _exactly(self, x: Tensor, mask: Tensor | None, documents: Tensor | None) -> Output:
        """What `_recur` makes of x [B, T, d_in], in the precision of the parameters, and without a gradient."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return Output(*self._recur(x, mask, documents))

    def _recur(
        self, given: Tensor | Code, mask: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Code, Tensor]:
        """x_hat, code and c of whole windows, exactly, in normalised units: of x [B, T, d_in], or of its code."""
        x_hat, code, c = whole(self, given, mask, documents)
        return x_hat, Code(*code), c

    def _check_acts(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> None:
        super()._check_acts(acts, mask, documents)
        if acts.dim() != 3:
            raise ValueError(f"acts: given shape {list(acts.shape)}; needed windows [B, T, d_in]: positions look back")


def _check_same(known: Bounds, given: Bounds) -> None:
    """Raise ValueError where a code is to be decoded with another mask or other documents than it was encoded with."""
    masks = [torch.tensor(True) if of is None else of.cpu() for of in (known.mask, given.mask)]
    starts = [torch.tensor(0) if of is None else document_starts(of.cpu()) for of in (known.documents, given.documents)]
    for name, (one, other) in (("mask", masks), ("documents", starts)):
        if not bool((one == other).all()):
            raise ValueError(f"{name}: given another than the code was encoded with; needed that, or leave it out")
