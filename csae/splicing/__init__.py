"""An SAE inside a language model that runs and generates: `splice`."""

from .spliced import Edit, Spliced, splice

__all__ = ["Edit", "Spliced", "splice"]
