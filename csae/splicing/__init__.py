"""An SAE inside a language model that runs and generates: `splice`."""

from .context import splice
from .edit import Edit
from .spliced import Spliced

__all__ = ["Edit", "Spliced", "splice"]
