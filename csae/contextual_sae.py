"""ContextualSAE: looks back, and encodes only what is new."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from csae.factors import Trace
from csae.ops import lookback_attention, sparse_decode, topk_encode
from csae.ops.lookback_attention import document_starts
from csae.sae import SAE, Code, Output

QUERIES = ("current", "past")


class ContextualSAE(SAE):
    """An SAE whose encoder attends to the codes of earlier positions and suppresses what they account for.

        c_t    = W_O concat_h sum_{j<t} A_h(t, j) v_j       keys and values: W_K and W_V rows of the code at j
        code_t = relu(topk(W_enc (x_t - b_dec - c_t) + b_enc, k))
        x_hat  = sum_i code_t.values_i * W_dec[code_t.indices_i] + c_t + b_dec

    The code at each position holds only what is new there. It is a recurrence over positions; training runs
    it in parallel by sweeps (sweep 0 does not look back, each further one looks at the codes of the one
    before), evaluation runs it exactly.

    Args: as `SAE`, and
        n_heads: heads of the look-back.
        d_head: width of a head's queries and keys.
        d_value: width of a head's values.
        query: "current": queries come from the activation itself, so that reconstruction needs the attention
            weights beside the codes. "past": from the reconstruction of the position before, so that the
            codes alone rebuild the whole window.
        sweeps: how often training looks back.
    """

    arch = "contextual"
    look_back = ("W_Q", "W_KV", "W_O", "slope", "null")

    W_Q: nn.Parameter
    """[n_heads * d_head, d_in]"""
    W_KV: nn.Parameter
    """[d_sae, n_heads * (d_head + d_value)]: W_K and W_V side by side, so that one gather serves both"""
    W_O: nn.Parameter
    """[d_in, n_heads * d_value]"""
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
        query: str = "current",
        sweeps: int = 2,
        k_aux: int | None = None,
        aux_coef: float = 1 / 32,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__(d_in, d_sae, k, k_aux, aux_coef, dead_after)
        if query not in QUERIES:
            raise ValueError(f"query: given {query!r}; needed one of {', '.join(map(repr, QUERIES))}")
        for name, size in (("n_heads", n_heads), ("d_head", d_head), ("d_value", d_value)):
            if size < 1:
                raise ValueError(f"{name}: given {size}; needed at least 1")
        if sweeps < 0:
            raise ValueError(f"sweeps: given {sweeps}; needed 0 or more")
        self.n_heads, self.d_head, self.d_value = n_heads, d_head, d_value
        self.query, self.sweeps = query, sweeps
        # A code of k features has a squared norm near d_in in normalised units: this makes keys and values
        # start near unit variance, and W_O makes c start small against x.
        self.W_KV = nn.Parameter(torch.randn(d_sae, n_heads * (d_head + d_value)) / math.sqrt(d_in))
        self.W_Q = nn.Parameter(torch.randn(n_heads * d_head, d_in) / math.sqrt(d_in))
        self.W_O = nn.Parameter(0.1 * torch.randn(d_in, n_heads * d_value) / math.sqrt(n_heads * d_value))
        self.slope = nn.Parameter(torch.linspace(0, 1, n_heads))
        self.null = nn.Parameter(torch.zeros(n_heads))

    @property
    def W_K(self) -> Tensor:
        """[d_sae, n_heads * d_head]"""
        return self.W_KV[:, : self.n_heads * self.d_head]

    @property
    def W_V(self) -> Tensor:
        """[d_sae, n_heads * d_value]"""
        return self.W_KV[:, self.n_heads * self.d_head :]

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
        x_hat, code, c = run(acts / self.scale, mask, documents)
        return Output(x_hat * self.scale, code, c * self.scale)

    def encode(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Code:
        """acts [B, T, d_in] -> the code [B, T, k], exact in evaluation mode; see `forward`."""
        return self.forward(acts, mask, documents).code

    def decode(
        self,
        code: Code,
        c: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The code [B, T, k] -> the reconstruction [B, T, d_in], in the units of the activations.

        With query="past" the codes alone are enough: c is rebuilt from them, given the mask and documents
        [B, T] that they were encoded with. With query="current" give the `c` of `Output`.
        """
        if c is None:
            if self.query != "past":
                raise ValueError('c: not given; needed with query="current": pass the c that forward() returned')
            return self._recur(code, mask, documents)[0] * self.scale
        return (sparse_decode(code.values, code.indices, self.W_dec) + self.b_dec) * self.scale + c

    def _run(
        self, x: Tensor, mask: Tensor | None, documents: Tensor | None, trace: Trace | None = None
    ) -> tuple[Tensor, Code, Tensor]:
        """x [B, T, d_in] in normalised units -> x_hat, code, c, by `sweeps` sweeps."""
        x = x - self.b_dec
        c = torch.zeros_like(x)
        given = x if trace is None else x.detach()
        code = self._encode(given, mask, trace)
        for _ in range(self.sweeps):
            query = x if self.query == "current" else self._shifted(self._rows("W_dec", code, trace) + c)
            c = self._look_back(query, code, mask, documents, trace)
            code = self._encode(given - c, mask, trace)
        return self._rows("W_dec", code, trace) + c + self.b_dec, code, c

    def _encode(self, x: Tensor, mask: Tensor | None, trace: Trace | None = None) -> Code:
        """x [..., d_in] without b_dec and c -> its code; empty where the mask [...] is False."""
        encode = topk_encode if trace is None else trace.encode
        values, indices = encode(x, self.W_enc, self.b_enc, self.k)
        return Code(values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0), indices)

    def _rows(self, table: str, code: Code, trace: Trace | None) -> Tensor:
        """The code [..., k] -> the sum of the rows that it names in W_dec or W_KV."""
        if trace is None:
            return sparse_decode(*code, getattr(self, table))
        return trace.decode(table, *code, getattr(self, table))

    def _look_back(
        self,
        query: Tensor,
        code: Code,
        mask: Tensor | None,
        documents: Tensor | None,
        trace: Trace | None = None,
    ) -> Tensor:
        """query [B, T, d_in] and the codes of all positions -> c [B, T, d_in]."""
        keys, values = self._keys_values(code, trace)
        queries = nn.functional.linear(query, self.W_Q).unflatten(-1, (self.n_heads, self.d_head))
        a = lookback_attention(queries, keys, values, self.slope, self.null, mask, documents)
        return nn.functional.linear(a.flatten(-2), self.W_O)

    def _keys_values(self, code: Code, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        """The code [..., k] -> keys [..., n_heads, d_head], values [..., n_heads, d_value]."""
        split = self.n_heads * self.d_head
        both = self._rows("W_KV", code, trace)
        return (
            both[..., :split].unflatten(-1, (self.n_heads, self.d_head)),
            both[..., split:].unflatten(-1, (self.n_heads, self.d_value)),
        )

    @staticmethod
    def _shifted(x: Tensor) -> Tensor:
        """x [B, T, d] -> what was one position earlier; zero at position 0."""
        return nn.functional.pad(x[:, :-1], (0, 0, 1, 0))

    @torch.no_grad()
    def _recur(
        self, given: Tensor | Code, mask: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Code, Tensor]:
        """x_hat, code and c, exactly, position by position, in normalised units.

        given: x [B, T, d_in] to encode; or a code [B, T, k] to decode without x, with query="past".
        Keys and values of the positions behind are kept, so that nothing is computed twice.
        """
        like, H = self.W_dec, self.n_heads
        B, T = (given if isinstance(given, Tensor) else given.values).shape[:2]
        x_hat, c = like.new_zeros(B, T, self.d_in), like.new_zeros(B, T, self.d_in)
        code = Code(like.new_zeros(B, T, self.k), x_hat.new_zeros(B, T, self.k, dtype=torch.int64))
        keys, values = like.new_zeros(B, H, T, self.d_head), like.new_zeros(B, H, T, self.d_value)
        nothing = self.null[:, None].expand(B, H, 1)
        # The price of each distance, farthest first: position t reads the last t of them.
        price = self.slope[:, None] * torch.arange(T, 0, -1, device=like.device).to(like.dtype).log()  # [H, T]
        position = torch.arange(T, device=like.device)
        mask = torch.ones(B, T, dtype=torch.bool, device=like.device) if mask is None else mask
        starts = position.new_zeros(B, T) if documents is None else document_starts(documents)
        for t in range(T):
            if self.query == "current":
                assert isinstance(given, Tensor)
                query = given[:, t] - self.b_dec
            else:
                query = x_hat[:, t - 1] - self.b_dec if t > 0 else torch.zeros_like(x_hat[:, 0])
            queries = nn.functional.linear(query, self.W_Q).view(B, H, self.d_head, 1)
            visible = mask[:, :t] & mask[:, t, None] & (position[:t] >= starts[:, t, None])  # [B, t]
            scores = (keys[:, :, :t] @ queries).squeeze(-1) / math.sqrt(self.d_head) - price[:, T - t :]
            scores = scores.masked_fill(~visible[:, None], -math.inf)  # [B, H, t]
            weights = torch.cat([scores, nothing], dim=-1).softmax(dim=-1)[:, :, None, :t]  # [B, H, 1, t]
            c[:, t] = nn.functional.linear((weights @ values[:, :, :t]).flatten(1), self.W_O)
            if isinstance(given, Tensor):
                here = self._encode(given[:, t] - self.b_dec - c[:, t], mask[:, t])
            else:
                here = Code(given.values[:, t], given.indices[:, t])
            code.values[:, t], code.indices[:, t] = here
            x_hat[:, t] = sparse_decode(*here, self.W_dec) + c[:, t] + self.b_dec
            keys[:, :, t], values[:, :, t] = self._keys_values(here)
        return x_hat, code, c

    def _check_acts(self, acts: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> None:
        super()._check_acts(acts, mask, documents)
        if acts.dim() != 3:
            raise ValueError(f"acts: given shape {list(acts.shape)}; needed windows [B, T, d_in]: positions look back")
