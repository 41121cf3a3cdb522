"""csae: train sparse autoencoders fast, and the contextual SAE, which encodes only what is new.

The ops are in `csae.ops`, their specification in `csae.reference`. Nothing is imported before it is used: so the
command line can say in one line what is missing, and `import csae` costs nothing. (A program of `torch.export` that
holds the ops needs `import csae.ops`.)
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which takes a moment to import: the program is to hear Ctrl-C soon
if TYPE_CHECKING:
    from typing import Any

    from csae import interop
    from csae.adam import Adam
    from csae.contextual_sae import ContextualSAE
    from csae.outputs import Code, Losses, Output
    from csae.patches import patch
    from csae.sae import SAE
    from csae.splicing import Edit, splice
    from csae.topk_sae import TopKSAE

__all__ = ["SAE", "Adam", "Code", "ContextualSAE", "Edit", "Losses", "Output", "TopKSAE", "interop", "patch", "splice"]
__version__ = "0.1.0"

_HOMES = {
    "adam": ["Adam"],
    "contextual_sae": ["ContextualSAE"],
    "outputs": ["Code", "Losses", "Output"],
    "patches": ["patch"],
    "sae": ["SAE"],
    "splicing": ["Edit", "splice"],
    "topk_sae": ["TopKSAE"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """One of the names above, or a module of this package."""
    from importlib import import_module
    from importlib.util import find_spec

    if name in _HOME:
        found = getattr(import_module(f"csae.{_HOME[name]}"), name)
        globals()[name] = found
        return found
    if not name.startswith("_") and find_spec(f"csae.{name}") is not None:
        return import_module(f"csae.{name}")
    raise AttributeError(f"module 'csae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
