"""A causal language model, read at its hook points, and its loss when what is at one of them is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from csae.data.blocks import (
    checked_replacement,
    device_of,
    find_blocks,
    hidden,
    n_vocab_of,
    run,
    text_config,
    with_hidden,
)
from csae.data.hook_points import HookPoint, HookPoints, on_read, on_replace
from csae.data.loading import load_pretrained
from csae.data.places import name_of_layer
from csae.errors import UserError, first_line


class LanguageModel:
    """A causal language model of transformers and its tokenizer, for reading only: no gradient goes through it.

    model: the transformers model, in evaluation mode. tokenizer: its tokenizer. name: what it was loaded from.
    d_in: the width of the residual stream. n_layers: the number of blocks. max_ctx: the longest window
    that it takes, or None where it has no limit. n_vocab: the number of token embeddings. hook_points: the places that
    can be read (`csae.data.hook_points`).
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        """Runs the model once, on a few tokens: see `find_blocks`. Raises UserError where it is of no use here."""
        model = getattr(model, "_orig_mod", model)  # a compiled model calls no hook that it was not compiled with
        blocks = find_blocks(model, name)
        self._blocks, self.d_in = blocks
        self.hook_points = HookPoints(model, name, blocks)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.n_layers = len(self._blocks)
        self.max_ctx = _max_ctx(text_config(model, name))
        self.n_vocab = n_vocab_of(model, name)

    @classmethod
    def load(
        cls, name: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """Loads a model by name: a Hugging Face id, a local folder, a .gguf file, or a folder with a single one.

        By default on CUDA in bfloat16 where there is CUDA, otherwise on the CPU in float32.
        Raises UserError, in one line, where there is no such model or it can't be read.
        """
        return cls(*load_pretrained(str(name), device, dtype), str(name))

    @property
    def device(self) -> torch.device:
        """Where tokens go in and results come out; of a model on several devices, the first."""
        return device_of(self.model)

    def block(self, layer: int) -> nn.Module:
        """The block whose output is the residual stream after `layer` blocks, 1 <= layer <= n_layers."""
        if not 1 <= layer <= self.n_layers:
            raise UserError(f"layer: given {layer}; {self.name} has layers 1 to {self.n_layers}")
        return self._blocks[layer - 1]

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises UserError where windows tokens [N, T] are too long for the model or hold ids it does not know."""
        n_ctx = tokens.shape[-1]
        if self.max_ctx is not None and n_ctx > self.max_ctx:
            raise UserError(f"n_ctx: given {n_ctx}; the context of {self.name} is {self.max_ctx} tokens at most")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.n_vocab:
            raise UserError(
                f"the tokens run from {int(tokens.min())} to {int(tokens.max())}, but {self.name} knows 0 to "
                f"{self.n_vocab - 1}: they come from another model's tokenizer"
            )

    def hook(self, hook: int | str) -> HookPoint:
        """The hook point of a name, or of the residual stream after a number of blocks, from 1."""
        if not isinstance(hook, str):
            self.block(hook)
            hook = name_of_layer(hook)
        return self.hook_points.one(hook)

    @torch.no_grad()
    def activations(self, tokens: Tensor, layer: int | str) -> Tensor:
        """What is at a hook point, or in the residual stream after `layer` blocks; nothing behind it runs.

        tokens [B, T] int64, B >= 1 -> [B, T, width] in the model's dtype, on the model's device. At layer n_layers this
        is the last block's own output, before the final norm that transformers applies to the last of
        its hidden_states. Attention runs over the whole window, document boundaries or not.
        """
        return self.read(tokens, [self.hook(layer)])[0]

    @torch.no_grad()
    def read(self, tokens: Tensor, points: Sequence[HookPoint]) -> list[Tensor]:
        """What is at several hook points, as `activations` gives it, from one pass that stops behind the last."""
        tokens = _checked_tokens(tokens).to(self.device)
        read: dict[str, Tensor] = {}
        wanted = {point.name for point in points}

        def note(point: HookPoint, acts: Tensor) -> None:
            if point.name in read:
                raise UserError(f"model {self.name!r} ran {point.path} twice in a pass, which it did once in another")
            last = len(read) + 1 == len(wanted)
            read[point.name] = acts if last else acts.clone()  # some models go on to add to it in place
            if last:
                raise _Stop

        with contextlib.ExitStack() as stack:
            for point in {point.name: point for point in points}.values():
                stack.callback(on_read(point, tokens.shape, partial(note, point)).remove)
            with contextlib.suppress(_Stop):
                run(self.model, tokens)
        for point in points:
            self._check_ran(point, point.name in read)
        return [read[point.name].to(self.device) for point in points]

    @torch.no_grad()
    def cross_entropy(
        self,
        tokens: Tensor,
        layer: int | str | None = None,
        replace: Callable[[Tensor], Tensor] | None = None,
        mask: Tensor | None = None,
        to: str | None = None,
    ) -> Tensor:
        """The next-token loss, in nats, at each position that has a next token.

        tokens [B, T] int64, B >= 1 -> [B, T - 1] float32, on the model's device. With `layer` (a layer, or the name of
        a hook point) and `replace`, `replace(acts [B, T, width]) -> [B, T, width]` takes the place of what is there;
        with `to`, of what is at that hook point, which the model must reach later, and of whose width it must be. Where
        mask [B, T] bool is given, only at its True positions. All B windows go through the model at once: it makes
        B * T * vocabulary logits in its own dtype; their float32 copies are a window at a time.
        """
        if (layer is None) != (replace is None):
            raise ValueError("layer and replace: given one without the other; needed both or neither")
        tokens = _checked_tokens(tokens).to(self.device)
        replaced: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if layer is not None and replace is not None:
                source = self.hook(layer)
                target = source if to is None else self.hook(to)
                given: list[Tensor] = []

                def put_in(acts: Tensor) -> Tensor:
                    if target is source:
                        given.append(acts)
                    if len(given) != 1 or replaced:
                        raise UserError(
                            f"model {self.name!r} reached {target.name} after {len(given)} runs of {source.path}; "
                            "needed one"
                        )
                    replaced.append(acts)
                    return checked_replacement(acts, replace(given[0]), mask)

                if target is not source:
                    stack.callback(on_read(source, tokens.shape, lambda acts: given.append(acts.clone())).remove)
                stack.callback(on_replace(target, tokens.shape, put_in).remove)
            logits = self._logits(run(self.model, tokens), *tokens.shape)
            if layer is not None:
                self._check_ran(target, bool(replaced))
        losses = [
            F.cross_entropy(window[:-1].float(), following[1:].long(), reduction="none")
            for window, following in zip(logits, tokens.to(logits.device), strict=True)
        ]
        return torch.stack(losses).to(self.device)

    @torch.no_grad()
    def logit_effects(self, directions: Tensor) -> Tensor:
        """What directions in the stream after the last block do to the next token's logits, by the model's own way.

        directions [m, d_in], m >= 1 -> [m, vocabulary] float32, on the model's device: the derivative of the logits
        along each direction, at a stream of zeros. A final norm is linear there: RMSNorm multiplies by its weight and
        by one large factor, LayerNorm also subtracts the mean. Projections, scales and caps after it are included,
        biases are not. So effects are right up to one positive factor that all directions share. Raises UserError where
        the model gives no logits, or no derivative.
        """
        if directions.dim() != 2 or directions.shape[1] != self.d_in or not len(directions):
            raise ValueError(f"directions: given shape {list(directions.shape)}; needed [m, {self.d_in}], m >= 1")
        m = len(directions)

        def put_in(module: nn.Module, args: Any, output: Any) -> Any:
            stream = hidden(output)
            zero = torch.zeros(m, 2, self.d_in, dtype=stream.dtype, device=stream.device)
            return with_hidden(output, forward_ad.make_dual(zero, directions.unsqueeze(1).expand(zero.shape).to(zero)))

        def follow(rows: int) -> Tensor | None:
            # Two tokens: some recurrent models take a single one as a continuation of the last text.
            tokens = torch.zeros(rows, 2, dtype=torch.int64, device=self.device)
            handle = self._blocks[-1].register_forward_hook(put_in)
            try:
                with forward_ad.dual_level():
                    return forward_ad.unpack_dual(self._logits(run(self.model, tokens), m, 2)).tangent
            finally:
                handle.remove()

        try:
            # One row runs through the blocks and m rows continue from the last: most models accept that.
            effects = follow(1)
        except (UserError, RuntimeError):
            try:
                effects = follow(m)
            except RuntimeError as error:
                raise UserError(
                    f"model {self.name!r}: what its last block does to the logits can't be followed "
                    f"({first_line(error)}); needed plain layers of PyTorch behind it"
                ) from error
        if effects is None:
            raise UserError(f"model {self.name!r}: its logits do not follow from what its last block gives")
        if not effects.isfinite().all():
            advice = "load it in float32 or bfloat16" if effects.dtype == torch.float16 else "its weights may be broken"
            raise UserError(
                f"model {self.name!r}: its logits have no finite derivative by what its last block gives, in "
                f"{effects.dtype}: {advice}"
            )
        return effects[:, -1].float().to(self.device)

    def _check_ran(self, point: HookPoint, ran: bool) -> None:
        if not ran:
            raise UserError(f"model {self.name!r} did not run {point.path}, which it did when it was looked at")

    def _logits(self, output: Any, B: int, T: int) -> Tensor:
        """The logits [B, T, vocabulary] in what the model gives."""
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (B, T):
            gives = f"logits {list(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
            raise UserError(
                f"model {self.name!r}: a {type(self.model).__name__} gives {gives} for {B} windows of {T} tokens; "
                f"needed [{B}, {T}, vocabulary]: a causal language model with its head"
            )
        return logits


class _Stop(Exception):
    """Thrown by a hook to leave the model's forward pass."""


def _checked_tokens(tokens: Tensor) -> Tensor:
    """Raises TypeError or ValueError where they are no token ids [B, T], B and T >= 1."""
    given = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
    if not isinstance(given, torch.dtype) or given.is_floating_point or given.is_complex or given == torch.bool:
        raise TypeError(f"tokens: given {given}; needed a tensor of integers [B, T]")
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens: given shape {list(tokens.shape)}; needed [B, T], B >= 1, T >= 1")
    return tokens


def _max_ctx(config: Any) -> int | None:
    """How many tokens the model takes at most, under the names that configs have for it; None where none says."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "context_length"):
        length = getattr(config, name, None)
        if type(length) is int and length > 0:
            return length
    return None
