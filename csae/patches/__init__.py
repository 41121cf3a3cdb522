"""Our ops under another library's SAEs, in one line: `csae.patch("sae_lens")`.

The library's classes stay, with their configs, state dicts, hooks and files; only the computation moves to `csae.ops`.
A module for each library lists what it replaces and the version it was tested with. Other versions are refused: a patch
that fits by chance could give wrong results.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from csae.errors import UserError

LIBRARIES = ("sae_lens", "sparsify", "dictionary_learning")

_applied: set[str] = set()


class Replacement(NamedTuple):
    """An attribute of a library's class or module, and our function that replaces it while the patch is applied."""

    owner: Any
    name: str
    ours: Callable[..., Any]


class Patch:
    """A patch that is applied. `undo` takes it back, as does the end of a `with` block."""

    def __init__(self, library: str, replacements: list[Replacement]) -> None:
        self.library = library
        self._originals = []
        for owner, name, ours in replacements:
            self._originals.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, ours)

    def undo(self) -> None:
        """Put the library's own code back. A second call does nothing."""
        for owner, name, original in reversed(self._originals):
            if original is None:  # it was inherited
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        if self._originals:
            self._originals = []
            _applied.discard(self.library)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


def patch(library: str) -> Patch:
    """Put our ops under a library's TopK SAEs: training and inference, of objects that exist and of later ones.

    library: "sae_lens", "sparsify" or "dictionary_learning"; it must be installed.

        csae.patch("sae_lens")           # until the process ends
        with csae.patch("sae_lens"): ... # and back

    Returns a `Patch`, whose undo() takes it back. If the library is patched already, this does nothing, and neither
    does undo() of the returned patch.

    Raises ValueError for another name, UserError (a ValueError too) where the library is missing or of a version
    that the patch was not tested with.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library: given {library!r}; needed one of {', '.join(map(repr, LIBRARIES))}")
    module = importlib.import_module(f"csae.patches.{library}")
    try:
        version = importlib.metadata.version(module.PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{module.PACKAGE} is not installed: pip install '{module.PACKAGE}=={module.TESTED}.*'"
        ) from error
    if not f"{version}.".startswith(f"{module.TESTED}."):
        raise UserError(
            f"{module.PACKAGE}: version {version} is installed, and the patch was tested with {module.TESTED}.*: "
            f"pip install '{module.PACKAGE}=={module.TESTED}.*', or go on without the patch"
        )
    if library in _applied:
        return Patch(library, [])
    applied = Patch(library, module.replacements())
    _applied.add(library)
    return applied
