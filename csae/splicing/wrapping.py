"""A module's forward run inside another function, and its arguments by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Wrapper:
    """A module's forward, run inside `around(signature, forward, args, kwargs)` while it lasts.

    Of a copy of the module, it is a plain forward: a function would go on to run the module that it was copied from.
    """

    def __init__(self, forward: Callable[..., Any], around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self.forward, self.around, self.signature, self.lasts = forward, around, inspect.signature(forward), True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.signature, self.forward, args, kwargs) if self.lasts else self.forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.forward,)


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


@contextmanager
def wrapped(module: nn.Module, around: Callable[..., Any]) -> Iterator[None]:
    """module.forward runs inside `around`, see `_Wrapper`, while the context lasts.

    Not by a hook: transformers 4.57 records hidden states inside the forward, before any hook, and 5 in hooks of its
    own. What is put in here is what they record.
    """
    forward, own = module.forward, vars(module).get("forward")
    wrapper = _Wrapper(forward, around)
    module.forward = wrapper  # type: ignore[method-assign]
    try:
        yield
    finally:
        wrapper.lasts = False  # who has wrapped it again in the meantime keeps a wrapper that does nothing
        if vars(module).get("forward") is wrapper:
            if own is None:
                del module.forward
            else:
                module.forward = own


def by_name(signature: inspect.Signature, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, those in its ** too; given by place or by name."""
    try:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:
        return dict(kwargs)  # it will say so itself
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments
