"""Moved to `csae.data.text`; this name goes with the next version."""

import sys
import warnings

from csae.data import text

warnings.warn("csae.text has moved: import csae.data.text", FutureWarning, stacklevel=2)
sys.modules[__name__] = text
