"""Moved to `csae.data.activations`; this name goes with the next version."""

import sys
import warnings

from csae.data import activations

warnings.warn("csae.activations has moved: import csae.data.activations", FutureWarning, stacklevel=2)
sys.modules[__name__] = activations
