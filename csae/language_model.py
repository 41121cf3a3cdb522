"""Moved to `csae.data.language_model`; this name goes with the next version."""

import sys
import warnings

from csae.data import language_model

warnings.warn("csae.language_model has moved: import csae.data.language_model", FutureWarning, stacklevel=2)
sys.modules[__name__] = language_model
