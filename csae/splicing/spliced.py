"""An SAE inside a language model: its reconstruction, or an edit of its features, in place of what is at a hook point.

    with csae.splice(model, layer, sae, [Edit(1207, scale=0)]) as spliced:
        model.generate(...)

    with csae.splice(model, "mlp.in:11", transcoder, to="mlp.out:11"):
        model.generate(...)

In generation the model sees one token at a time; a contextual SAE follows it on a streaming state, with the same
codes as if it had seen the whole text at once. `csae.splicing.following` says which text a pass goes on with.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from csae.contextual_sae import ContextualSAE
from csae.data.activations import Begun, follow_mask
from csae.data.blocks import hidden, in_windows, with_hidden
from csae.data.hook_points import HookPoint
from csae.data.probe import input_of, with_input
from csae.look_back import LookBack
from csae.recurrence import State
from csae.sae import SAE, Code, Output
from csae.selection import in_use
from csae.splicing.edit import Edit
from csae.splicing.following import Content, caches_in, content_of, is_known, named
from csae.splicing.remembered import Remembered, part_of, restore, to_overwrite
from csae.splicing.visible import first_position, visible
from csae.splicing.wrapping import by_name


@dataclass
class _Pass:
    """A call of the model, from its outermost module to the end."""

    thread: int
    entered: list[tuple[Any, Content]] = field(default_factory=list)
    """the caches that hold something, as they were before it"""
    caches: list[Any] = field(default_factory=list)
    """all caches seen; after the pass, the last is asked first"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """of the innermost module around the block, by name"""
    given: Tensor | None = None
    """[B, T, d_in]: what a transcoder reads, once the model has reached it"""
    text: Remembered | None = None
    """the text that it continues"""
    new: dict[str, Tensor] | None = None
    """what went through the hook point, tables [B, T, ...]"""
    state: State | None = None
    """of the SAE, after it"""
    overwritten: tuple[int, Tensor, Tensor] | None = None


class Spliced:
    """The SAE inside the model: what it gives for each pass, and what it remembers between passes."""

    output: Output | None = None
    """of the last pass through the model, before edits: [B, T, ...], in generation T = 1"""
    mask: Tensor | None = None
    """[B, T] bool: the positions of the last pass where the SAE's output was put in"""

    def __init__(
        self, sae: SAE, edits: Sequence[Edit], keep_error: bool, look_back: int | None, source: HookPoint, to: HookPoint
    ) -> None:
        self.sae, self.edits, self.keep_error, self.look_back = sae, edits, keep_error, look_back
        self._source, self._to = source, to
        features = torch.tensor([edit.feature for edit in edits], dtype=torch.int64, device=sae.W_dec.device)
        self._features = features
        self._directions = sae.W_dec.detach()[features]  # [m, d_out]
        self._carried_directions = LookBack.of(sae).carried_by(features) if isinstance(sae, ContextualSAE) else None
        self._texts: list[Remembered] = []  # the last one first
        self._pass: _Pass | None = None
        self._passes = 0
        self._failure: Exception | None = None  # of the last pass that failed
        self._replaced: Tensor | None = None  # scalar bool

    def around(self, signature: inspect.Signature, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module around the block runs."""
        with self._running() as (running, outermost):
            values = (*args, *kwargs.values())
            rows = next((len(value) for value in values if isinstance(value, Tensor) and value.dim() > 1), None)
            for cache in caches_in(values):
                content = None if any(cache is known for known in running.caches) else content_of(cache, rows)
                running.caches.append(cache)
                if content is not None:
                    running.entered.append((cache, content))
            running.arguments = by_name(signature, args, kwargs)
            output = forward(*args, **kwargs)
            running.caches += caches_in(
                output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
            )
            if outermost:
                self._remember(running)
        return output

    def at_block(self, signature: inspect.Signature, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The block of the hook point runs: it shows the caches that only blocks are given."""
        with self._running() as (running, outermost):
            caches = list(
                caches_in(value for value in (*args, *kwargs.values()) if not isinstance(value, list | tuple))
            )
            if outermost:
                running.arguments = by_name(signature, args, kwargs)
                if any(content_of(cache, None) is not None for cache in caches):
                    raise ValueError(
                        "the block was called by itself with a cache; needed a call of the model around it"
                    )
            running.caches += caches
            return forward(*args, **kwargs)

    def at_source(self, signature: inspect.Signature, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module whose input or output a transcoder reads runs."""
        with self._running() as (running, _):

            def read(given: Any) -> Any:
                if running.given is not None:
                    raise ValueError(f"{self._source.path} ran twice in one pass through the model; needed once")
                self._check(given, self._source, self.sae.d_in)
                running.given = given.clone()  # some models go on to add to it in place
                return given

            return _at(self._source, read, forward, args, kwargs)

    def at_hook(self, signature: inspect.Signature, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module whose input or output is replaced runs."""
        with self._running():
            return _at(self._to, self.replace, forward, args, kwargs)

    @contextmanager
    def _running(self) -> Iterator[tuple[_Pass, bool]]:
        """The running pass, and whether it begins here. A pass that fails leaves no trace."""
        outermost = self._pass is None
        running = self._pass = self._pass or _Pass(threading.get_ident())
        if running.thread != threading.get_ident():
            raise ValueError(
                "the model is called from two threads at once; needed one pass after the other in a splice"
            )
        try:
            yield running, outermost
        except Exception as error:
            self._failure = error
            raise
        finally:
            if outermost:
                self._pass = None
                if running.overwritten is not None and running.state is not None:
                    restore(running.state, running.overwritten, running.overwritten[0])

    @torch.no_grad()
    @torch.inference_mode(False)
    def replace(self, there: Tensor) -> Tensor:
        """What is at the hook point, [B, T, d_out] -> what is put in its place."""
        sae, running = self.sae, self._pass
        self._check(there, self._to, sae.d_out)
        if running is None or running.new is not None:
            raise ValueError(
                f"{self._to.path} ran twice in one pass through the model; needed once, as a run adds positions to the "
                "text"
            )
        given = running.given if self._source is not self._to else there
        if given is None:
            raise ValueError(f"{self._to.path} ran before {self._source.path}, which the SAE reads; needed it after it")
        if given.shape[:2] != there.shape[:2]:
            raise ValueError(
                f"{self._source.name} is {list(given.shape[:2])} positions, {self._to.name} {list(there.shape[:2])}; "
                "needed the same"
            )
        B, T = given.shape[:2]
        text = running.text = self._continued(running, B)
        seen, earlier = visible(running.arguments, B, T, text.length)
        seen = given.new_ones(B, T, dtype=torch.bool) if seen is None else seen.to(given.device)
        if text.length == 0 and first_position(running.arguments) > 0:
            raise ValueError(
                f"a pass begins at position {first_position(running.arguments)}, and no cache shows what went before; "
                "needed whole texts: use_cache=False"
            )
        begun = begun_there = None
        if text.length:
            said = text.table("said")
            if earlier is not None and not torch.equal(earlier.to(said.device), said):
                raise ValueError(
                    "attention_mask: differs from earlier passes at their positions; needed the same there"
                )
            begun = Begun(text.table("seen").any(dim=1), text.table("usual")[:, -1])
        self.mask, after = follow_mask(given, begun, seen, *sae.masking)
        new = {
            "said": seen,
            "seen": seen & (given != 0).any(dim=-1),
            "usual": after.usual_norm.unsqueeze(1).expand(B, T),
        }
        if self._source is not self._to:
            if text.length:
                begun_there = Begun(text.table("seen there").any(dim=1), text.table("usual there")[:, -1])
            mask, after = follow_mask(there, begun_there, seen.to(there.device), *sae.masking)
            self.mask = self.mask & mask.to(self.mask.device)
            new["seen there"] = seen.to(there.device) & (there != 0).any(dim=-1)
            new["usual there"] = after.usual_norm.unsqueeze(1).expand(B, T)
        acts = given.to(sae.W_dec)
        carried = None
        if isinstance(sae, ContextualSAE):
            mask = self.mask.to(acts.device)
            state = text.state
            if state is None:
                room = self.look_back or max(256, T)
                state = sae.recurrence.initial_state(B, room, self.look_back is not None, self._features)
            # The last positions run apart: what they overwrite is kept, as they may be rejected.
            first = max(0, T - state.memory.shape[1]) if state.bounded else 0
            running.state = state.clone() if first else state
            parts = []
            for part in (slice(0, first), slice(first, T)) if first else (slice(0, T),):
                running.overwritten = to_overwrite(running.state, part.stop - part.start)
                made = sae.recurrence.advance(acts[:, part] / sae.scale, running.state, mask[:, part], None)
                running.state = made[-1]
                parts.append((made[0], *made[1], *made[2:-1]))
            x_hat, values, indices, c, carried = (torch.cat(same, dim=1) for same in zip(*parts, strict=True))
            self.output = Output(x_hat * sae.out_scale, Code(values, indices), c * sae.out_scale)
            if sae.query == "past":
                past = x_hat - sae.b_dec
                if sae.W_skip is not None:
                    past = past - nn.functional.linear(acts / sae.scale - sae.centre, sae.W_skip)
                new["past"] = past
        else:
            with in_use(sae):
                self.output = sae(acts, self.mask)
        # `there` itself, not what the SAE was given: its weights may have a narrower dtype.
        base = there if self.keep_error else self.output.x_hat
        change = self._edited(self.output.code, carried) * sae.out_scale
        replaced = (base + change.to(base.device)).to(there)
        running.new = new
        self._passes += 1
        replaced_any = self.mask.any()
        self._replaced = (
            replaced_any if self._replaced is None else self._replaced | replaced_any.to(self._replaced.device)
        )
        return torch.where(self.mask.to(there.device).unsqueeze(-1), replaced, there)

    @staticmethod
    def _check(acts: Any, point: HookPoint, width: int) -> None:
        if not isinstance(acts, Tensor) or acts.dim() != 3 or acts.shape[-1] != width:
            raise ValueError(f"{point.path} has {_described(acts)} at {point.name}; needed [B, T, {width}]")

    def _continued(self, running: _Pass, B: int) -> Remembered:
        """The text that a pass continues, by the caches that it was given; an empty one if they hold nothing."""
        given = [(cache, content) for cache, content in reversed(running.entered) if is_known(cache)]
        given = given or running.entered
        if not given:
            return Remembered()
        for cache, content in given:
            for text in sorted(self._texts, key=lambda text: not text.owned_by(cache)):
                found = text.found_in(content)
                if found is None:
                    continue
                rows, kept = found
                if content.marks.shape[0] != B:
                    raise ValueError(f"{named(cache)} holds {content.marks.shape[0]} rows; needed {B}, as in the pass")
                if rows is None and kept == text.length and text.owned_by(cache) and len(text.owners) == 1:
                    return text
                return part_of(text, rows, kept)
        cache, content = given[0]
        holds = f"{content.length} positions" if content.length else "a state"
        raise ValueError(
            f"{named(cache)} holds {holds} that did not go through this splice unchanged; run the prompt inside the "
            "splice from its first token, and change its cache only as generate does"
        )

    @torch.inference_mode(False)
    def _remember(self, running: _Pass) -> None:
        """After a pass: which cache holds it, and the marks that it is known by."""
        text, new = running.text, running.new
        if text is None or new is None:
            return  # the pass ended before the hook point
        B, T = next(iter(new.values())).shape[:2]
        known = [cache for cache in running.caches if is_known(cache)] or running.caches
        grown = []
        for cache in reversed(known):
            content = content_of(cache, B)
            if content is None:
                continue
            before = next((content for entered, content in running.entered if entered is cache), None)
            if before is not None and before.length == content.length and torch.equal(before.marks, content.marks):
                continue  # the cache did not keep the pass
            if content.length is not None and content.length != text.length + T:
                grown.append(f"{named(cache)} holds {content.length} positions")
                continue
            ids = running.arguments.get("input_ids")
            if content.length is None and isinstance(ids, Tensor) and ids.shape != (B, T):
                grown.append(f"{list(ids.shape)} tokens were given")
                continue
            if content.marks.shape[0] != B:
                grown.append(f"{named(cache)} holds {content.marks.shape[0]} rows")
                continue
            marks = torch.zeros(B, text.length + T, dtype=torch.int64, device=new["seen"].device)
            marks[:, (-1 if content.first is None else content.first) :] = content.marks.to(marks.device)
            text.append(new | {"marks": marks[:, text.length :]})
            text.state, text.overwritten, running.overwritten = running.state, running.overwritten, None
            for other in self._texts:
                other.disown(cache)
            text.own(cache)
            self._texts = [text] + [other for other in self._texts if other is not text and other.is_alive()]
            return
        if grown:
            raise ValueError(
                f"after a pass of {T} positions in {B} rows, with {text.length} before, {grown[0]}; needed a "
                "cache that grows by the positions of each pass"
            )

    def check_used(self) -> None:
        """Raises RuntimeError where the block never ran, and warns where nothing was put in at any position."""
        if self._passes == 0:
            if self._failure is not None:
                raise RuntimeError(f"splice: left without having replaced anything: {self._failure}") from self._failure
            raise RuntimeError(
                f"splice: left without having replaced anything: {self._to.path} never ran; needed a call of the model "
                "that was given, not of a copy, nor of an exported form of it"
            )
        if self._replaced is not None and not bool(self._replaced):
            warnings.warn(
                "splice: left without having replaced anything: all positions were padding or first ones", stacklevel=4
            )

    def _edited(self, code: Code, carried: Tensor | None) -> Tensor:
        """What the edits add to the reconstruction, [B, T, d_out], in normalised units."""
        added = torch.zeros(*code.values.shape[:-1], self.sae.d_out).to(code.values)
        for number, edit in enumerate(self.edits):
            if edit.part != "carried":
                active = torch.where(code.indices == edit.feature, code.values, 0).sum(dim=-1)  # [B, T]
                added += edit.delta(active).unsqueeze(-1) * self._directions[number]
            if edit.part != "new" and carried is not None and self._carried_directions is not None:
                change = edit.delta(carried[..., number])  # [B, T, n_heads]
                added += change @ self._carried_directions[:, number]
        return added


def _at(
    point: HookPoint, change: Callable[[Tensor], Tensor], forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Runs a module with what is at a hook point of it changed."""
    if point.side == "out":
        output = forward(*args, **kwargs)
        given, found = hidden(output), input_of(args, kwargs)
        acts = given if found is None else in_windows(given, found[1].shape[:2])
        return with_hidden(output, change(acts).view_as(given))
    found = input_of(args, kwargs)
    if found is None:
        raise ValueError(f"{point.path} was given no tensor [B, T, {point.width}], which is {point.name}")
    args, kwargs = with_input(args, kwargs, found[0], change(found[1]))
    return forward(*args, **kwargs)


def _described(value: Any) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
