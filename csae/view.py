"""Moved to `csae.pages.view`; this name goes with the next version."""

import sys
import warnings

from csae.pages import view

warnings.warn("csae.view has moved: import csae.pages.view", FutureWarning, stacklevel=2)
sys.modules[__name__] = view
