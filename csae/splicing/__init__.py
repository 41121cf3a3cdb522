"""An SAE inside a language model that runs and generates: `splice`."""

from .edit import Edit
from .spliced import Spliced, splice

__all__ = ["Edit", "Spliced", "splice"]
