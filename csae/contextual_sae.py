"""ContextualSAE: looks back, and encodes only what is new."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from csae.forward_pass import Pass
from csae.look_back import LookBack
from csae.ops import sparse_decode
from csae.ops.checks import autocast_to, check_tensor
from csae.ops.lookback_attention import document_starts
from csae.outputs import Bounds, Code, Output, Ran, Sweeps
from csae.recurrence import Recurrence, State
from csae.sae import SAE, check_bounds

# The two queries, and the steepest slope that a head begins with. With query="past", the useful positions are recent:
# an exact FVU of 0.151, against 0.154 with a steepest slope of 1. With "current" it was 0.136 with 1, 0.137 with 3.
QUERIES = {"current": 1.0, "past": 6.0}
# A product of the look-back's width is narrow where it is this many times narrower than d_in.
NARROW = 4
# What `decode` takes for the mask and documents that it is not given.
AS_ENCODED = "as encoded"
# Bytes of pre-activations that are kept from one sweep to the next: at least so many, on CUDA a share of the device's
# memory. Not of what is free: windows that are run together are one product, and a run should repeat to the bit.
KEPT_BYTES, KEPT_SHARE = 256 << 20, 1 / 16


class ContextualSAE(SAE):
    """An SAE whose encoder attends to the codes of earlier positions and suppresses what they account for.

        c_t    = what position t reads from the codes before it (`csae.look_back`)
        code_t = relu(topk(W_enc (x_t - b_dec - c_t) + b_enc, k))
        x_hat  = sum_i code_t.values_i * W_dec[code_t.indices_i] + c_t + b_dec

    The code at each position holds only what is new there. It is a recurrence over positions. Training runs it in
    parallel by sweeps: sweep 0 does not look back, each further one looks at the codes of the one before. Evaluation
    runs it exactly.

    A transcoder (`d_out`) predicts other activations than those it reads. Attention gives one a_t, and two maps read it
    out, each into the space where it is used:

        c_t    = W_O a_t                                                        in the target's space, for the decoder
        code_t = relu(topk(W_enc (x_t - mean - W_I a_t) + b_enc, k))            in the input's, for the encoder
        x_hat  = sum_i code_t.values_i * W_dec[code_t.indices_i] + c_t + b_dec + W_skip (x_t - mean)

    An autoencoder is the case W_I = W_O. W_I starts at zero, and learns from the loss of the target what the encoder
    should leave out because c has it already. With query="past", queries come from the reconstruction before, without
    its skip connection: the codes alone give all that is not W_skip x.

    c has a bound whatever the codes are (`c_bound`), so the recurrence can't diverge, on windows of any length. Without
    the bound, training with query="past" diverged at a learning rate of 4e-3.

    Args: as `SAE`, and
        n_heads: heads of the look-back.
        d_head: width of a head's queries and keys.
        d_value: width of a head's values.
        d_memory: how many numbers a feature writes into the memory; keys and values are maps of them.
        k_mem: how many features of a code are remembered, the most active ones; all if not given. Fewer make
            c easier to read, at a price in FVU.
        query: "current": queries come from the activation itself, so reconstruction needs the attention weights
            beside the codes. "past": from the reconstruction of the position before, so the codes alone rebuild
            the whole window.
        sweeps: how often the parallel form looks back. Training takes fewer at first (`TrainConfig.early_sweeps`).
    """

    arch = "contextual"
    look_back = tuple(name for name in LookBack._fields if name != "W_I")

    # As `LookBack` describes them.
    W_mem: nn.Parameter
    W_Q: nn.Parameter
    W_K: nn.Parameter
    W_V: nn.Parameter
    W_O: nn.Parameter
    gain: nn.Parameter
    slope: nn.Parameter
    null: nn.Parameter
    W_I: nn.Parameter | None

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
        d_out: int | None = None,
        skip: bool = False,
        selection: str = "topk",
        k_max: int | None = None,
        l0_coef: float = 1.0,
        bandwidth: float = 0.1,
        prefixes: Sequence[int] = (),
    ) -> None:
        selecting = selection, k_max, l0_coef, bandwidth
        super().__init__(d_in, d_sae, k, k_aux, aux_coef, dead_after, d_out, skip, *selecting, prefixes)
        if query not in QUERIES:
            raise ValueError(f"query: given {query!r}; needed one of {', '.join(map(repr, QUERIES))}")
        sizes = {"n_heads": n_heads, "d_head": d_head, "d_value": d_value, "d_memory": d_memory}
        for name, count in (sizes | {"k_mem": self.k_max if k_mem is None else k_mem, "sweeps": sweeps}).items():
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name}: given {count!r}; needed a whole number")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: given {size}; needed at least 1")
        if k_mem is not None and not 1 <= k_mem <= self.k_max:
            slots = "k" if selection == "topk" else "k_max"
            raise ValueError(f"k_mem: given {k_mem}; needed 1 to {slots} = {self.k_max}, or None for all")
        if sweeps < 0:
            raise ValueError(f"sweeps: given {sweeps}; needed 0 or more")
        self.n_heads, self.d_head, self.d_value, self.d_memory = n_heads, d_head, d_value, d_memory
        self.k_mem = self.k_max if k_mem is None else k_mem
        self.query, self.sweeps = query, sweeps
        d_query = self.d_out if query == "past" else d_in
        initial = LookBack.initial(d_in, d_sae, **sizes, steepest=QUERIES[query], d_out=d_out, d_query=d_query)
        for name, tensor in initial._asdict().items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        if self.is_transcoder:
            self.look_back = LookBack._fields

    @torch.no_grad()
    def c_bound(self) -> float:
        """What the length of c, in its units, never exceeds."""
        return LookBack.of(self).bound() * float(self.out_scale)

    @property
    def recurrence(self) -> Recurrence:
        """The exact form, on the weights as they are now."""
        self._check_whole("exact form")
        return self._recurrence()

    def _recurrence(self) -> Recurrence:
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.W_skip, self.centre)
        scales = (self.scale, self.out_scale)
        over = None if self.shard is None else self.shard.recurring(self)
        how = self.k_max, self.k_mem, self.query == "past"
        threshold = None if self.threshold is None else self.threshold.detach()
        return Recurrence(*weights, scales, LookBack.of(self), *how, over, threshold)

    def forward(
        self,
        acts: Tensor,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
        exact: bool | None = None,
        sweeps: Sweeps | None = None,
    ) -> Output:
        """acts [B, T, d_in] -> `Output`.

        Args:
            mask: [B, T] bool, True where a position takes part. One that doesn't gets an empty code.
            documents: [B, T] integer; nothing is carried across the boundary of a run of equal ids.
            exact: the recurrence as it is defined (no gradient), or sweeps of it in parallel. If not given: sweeps
                in training mode or where `sweeps` are given, otherwise exact.
            sweeps: which sweeps; by the SAE's own `sweeps` if not given.
        """
        self._check_whole("forward")
        if exact and sweeps is not None:
            raise ValueError("exact, sweeps: both given; needed one of them: the exact form has no sweeps")
        exact = exact or (exact is None and sweeps is None and not self.training)
        output = self.forward_anywhere(acts, mask, documents, exact, sweeps)
        return output._replace(code=Code.of_windows(*output.code, mask, documents))

    def forward_anywhere(
        self, acts: Tensor, mask: Tensor | None, documents: Tensor | None, exact: bool, sweeps: Sweeps | None
    ) -> Output:
        """As `forward`, also where others own rows too: all processes call it, each with as many windows of its own."""
        self._check_acts(acts, mask, documents)
        x = self._normalised(acts)
        if exact:
            found = self._recur(x, mask, documents)
        else:
            ops = Pass(self, self.training) if self.shard is None else self.shard.trace(self, (), self.training)
            found = self._run(ops, x, mask, documents, sweeps)
        return self._output(found.x_hat, found.code, found.c, acts.dtype)

    def code_in_use(self, acts: Tensor, mask: Tensor | None, documents: Tensor | None) -> Code:
        return self.forward_anywhere(acts, mask, documents, True, None).code

    def encode(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Code:
        """acts [B, T, d_in] -> the code [B, T, k_max], exact in evaluation mode; see `forward`."""
        return self.forward(acts, mask, documents).code

    def decode(
        self,
        code: Code,
        c: Tensor | None = None,
        mask: Tensor | str | None = AS_ENCODED,
        documents: Tensor | str | None = AS_ENCODED,
        acts: Tensor | None = None,
    ) -> Tensor:
        """The code [B, T, k_max] -> the reconstruction [B, T, d_out], in the units of what is reconstructed.

        With query="past" the codes alone are enough: c is rebuilt from them, given the mask and documents [B, T] that
        they were encoded with. A code that `forward` or `encode` gave knows these (`Code.bounds`). With another code,
        from a file for example, give them, or None where there were none. With query="current" give the `c` of
        `Output`. A skip connection also reads the activations, acts [B, T, d_in].

        Raises ValueError where what is needed is not known, or is not what the code was encoded with.
        """
        self._check_whole("decode")
        values, indices = code
        if values.dim() != 3:
            raise ValueError(f"code: given values of shape {list(values.shape)}; needed those of windows, [B, T, k]")
        if c is None:
            if self.query != "past":
                raise ValueError('c: not given; needed with query="current": pass the c that forward() returned')
            bounds = self._bounds(values.shape[:-1], getattr(code, "bounds", None), mask, documents)
            x_hat = self._recur(Code(values, indices), *bounds).x_hat
            return self._in_units_of(self._skip_of(x_hat, acts), self.W_dec.dtype)
        check_tensor("c", c)
        if not c.is_floating_point():
            raise TypeError(f"c: given dtype {c.dtype}; needed a floating dtype, as forward() gives it")
        if c.shape != (*values.shape[:-1], self.d_out):
            raise ValueError(
                f"c: given shape {list(c.shape)}; needed {[*values.shape[:-1], self.d_out]}, as the code is"
            )
        alone = sparse_decode(values.to(self.W_dec.dtype), indices, self.W_dec) + self.b_dec
        wide = torch.promote_types(self.W_dec.dtype, torch.float32)
        return (self._in_units_of(self._skip_of(alone, acts), wide) + c).to(self.W_dec.dtype)

    def _bounds(
        self, positions: torch.Size, known: Bounds | None, mask: Tensor | str | None, documents: Tensor | str | None
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

        look_back: how many positions a sequence remembers; each takes 4 * n_heads * (d_head + d_value) bytes in
            float32. If not given, all of them, in a memory that grows.
        """
        for name, size in (("B", B), ("look_back", 1 if look_back is None else look_back)):
            if size < 1:
                raise ValueError(f"{name}: given {size}; needed at least 1")
        return self.recurrence.initial_state(B, look_back or 256, bounded=look_back is not None)

    def step(
        self, acts: Tensor, state: State, mask: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Code, State]:
        """The next activations of B sequences -> their code, exactly as in `encode`, and the state after them.

        Any way of cutting a sequence into steps gives the same codes. A state and the one after it share their
        memory: `state.clone()` to continue in two ways.

        Args:
            acts: [B, d_in], one position of each sequence, or [B, n, d_in], the next n.
            state: what `initial_state` or the last step gave.
            mask: [B] or [B, n] bool, True where a position takes part.
            documents: [B] or [B, n] integer; nothing is carried from one id to the next.

        Returns:
            the code, [B, k_max] or [B, n, k_max]; `stream` gives the reconstruction too.
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
        x_hat, found, c, _, state = self.recurrence.advance(self._normalised(acts), state, mask, documents)
        return self._output(x_hat, Code(*found), c, acts.dtype), state

    def _run(self, ops: Pass, x: Tensor, mask: Tensor | None, documents: Tensor | None, sweeps: Sweeps | None) -> Ran:
        """x [B, T, d_in] in normalised units -> what becomes of it, by sweeps."""
        sweeps = Sweeps(self.sweeps) if sweeps is None else sweeps
        windows = self._windows_to_keep(x, sweeps)
        if windows == 0 or (ops.rule.shared and windows < x.shape[0]):  # a budget is that of all windows
            return self._sweep(ops, x, mask, documents, sweeps, None)
        W_a = ops.table("W_enc") @ (self.W_O if self.W_I is None else self.W_I).detach()
        found = []
        for start in range(0, x.shape[0], windows):
            part = slice(start, start + windows)
            here, of = (None if tensor is None else tensor[part] for tensor in (mask, documents))
            found.append(self._sweep(ops, x[part], here, of, sweeps, W_a))
        if len(found) == 1:
            return found[0]
        parts, codes, cs, suppressed, groups = zip(*found, strict=True)
        values, indices = zip(*codes, strict=True)
        c = torch.cat(cs)
        code = Code(torch.cat(values), torch.cat(indices))
        of_groups = torch.cat(groups) if ops.prefixes else None
        together = tuple(of[0] if of[0] is self.b_dec else torch.cat(of) for of in zip(*parts, strict=True))
        return Ran(together, code, c, c if self.W_I is None else torch.cat(suppressed), of_groups)

    def _windows_to_keep(self, x: Tensor, sweeps: Sweeps) -> int:
        """How many windows at a time keep the pre-activations of sweep 0; none where that is no gain.

        c has rank n_heads * d_value. So a further sweep can be a product of that width instead of d_in, and 8 bytes for
        each pre-activation that is kept. On an H100 these bytes cost as much as 2,000 operations, so the product has to
        be narrow. With d_in = 2,304, d_sae = 16,384 and 1,024 tokens, on 2 cores with AVX-512, a training step then
        takes 0.92 of the time with one sweep, and 0.64 with three.
        """
        wide = NARROW * self.n_heads * self.d_value > self.d_in
        if sweeps.times == 0 or sweeps.from_exact or wide or x.numel() == 0 or self.shard is not None:
            return 0
        return kept_bytes(x.device) // (4 * x.shape[1] * self.d_sae)

    def _sweep(
        self, ops: Pass, x: Tensor, mask: Tensor | None, documents: Tensor | None, sweeps: Sweeps, W_a: Tensor | None
    ) -> Ran:
        """As `_run`; with W_a, W_enc times W_O or W_I, [d_sae, n_heads * d_value], by narrow products after sweep 0."""
        look_back = LookBack.of(self).under_autocast()
        start = self._recur(x, mask, documents) if sweeps.from_exact else None
        x = ops.centred(x)
        encode = ops.encoder(mask)
        # What is left of x is made from x itself; all else takes it in autocast's dtype, cast once.
        seen = x if x.requires_grad else autocast_to(x)[0]
        queries = kept = a = x.new_zeros(())
        found: tuple[Tensor, Tensor]
        if self.query == "current":
            queries = look_back.queries(seen, ops.shift())
        if start is not None:
            found, c, suppressed = start.code, start.c, start.suppressed
            code = self._encoded(ops, ops.left(x, suppressed), found, mask)
        else:
            suppressed = a.expand_as(x)
            c = a.expand(*x.shape[:-1], self.d_out)
            if W_a is None:
                found = encode(seen)
            else:
                values, indices, kept = ops.encode_and_keep(seen, mask)
                found = values, indices
            code = self._encoded(ops, seen, found, mask)
        for _ in range(sweeps.times):
            if self.query == "past":
                queries = look_back.queries(self._shifted(ops.decode("W_dec", code) + c))
            memory = ops.decode("W_mem", code, most_active=self.k_mem if self.k_mem < self.k_max else None)
            before, a = a, look_back.read(queries, memory, mask, documents)
            further = a if before.dim() == 0 else a - before
            c, suppressed = look_back.written(a)
            left = ops.left(x, suppressed)
            found = encode(left) if W_a is None else ops.rule.encode_again(kept, further, W_a, mask)
            code = self._encoded(ops, left, found, mask)
        decoded, groups = ops.reconstruct(code)
        return Ran((decoded, c, self.b_dec, *self._skipped(x)), code, c, suppressed, groups)

    def _encoded(self, ops: Pass, x: Tensor, found: tuple[Tensor, Tensor], mask: Tensor | None) -> Code:
        """The code of x [..., d_in], `found` without a gradient, with its gradient; empty where the mask is False."""
        values, indices = found
        if mask is not None:  # before there is a gradient: it takes no second pass then
            values = torch.where(mask.unsqueeze(-1), values, 0)
        return Code(*ops.encode(x, mask, (values, indices)))

    @staticmethod
    def _shifted(x: Tensor) -> Tensor:
        """x [B, T, d] -> what was one position earlier; zero at position 0."""
        if x.shape[1] == 0:
            return x
        return nn.functional.pad(x[:, :-1], (0, 0, 1, 0))

    def _recur(self, given: Tensor | Code, mask: Tensor | None, documents: Tensor | None) -> Ran:
        """What becomes of whole windows, exactly, in normalised units: of x [B, T, d_in], or of its code.

        In the precision of the parameters, and without a gradient. Of a code, without a skip connection.
        """
        x_hat, code, c, suppressed = self._recurrence().whole(given, mask, documents)
        return Ran((x_hat,), Code(*code), c, suppressed)

    def _check_acts(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> None:
        super()._check_acts(acts, mask, documents)
        if acts.dim() != 3:
            raise ValueError(f"acts: given shape {list(acts.shape)}; needed windows [B, T, d_in]: positions look back")


def kept_bytes(device: torch.device) -> int:
    """How many bytes of pre-activations are kept at a time."""
    if device.type != "cuda":
        return KEPT_BYTES
    return max(KEPT_BYTES, int(KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory))


def _check_same(known: Bounds, given: Bounds) -> None:
    """Raise ValueError where a code is to be decoded with another mask or other documents than it was encoded with."""
    masks = [torch.tensor(True) if of is None else of.cpu() for of in (known.mask, given.mask)]
    starts = [torch.tensor(0) if of is None else document_starts(of.cpu()) for of in (known.documents, given.documents)]
    for name, (one, other) in (("mask", masks), ("documents", starts)):
        if not bool((one == other).all()):
            raise ValueError(f"{name}: given another than the code was encoded with; needed that, or leave it out")
