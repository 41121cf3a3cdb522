"""csae: train sparse autoencoders fast, and the contextual SAE, which encodes only what is new.

The ops are in `csae.ops`, their specification in `csae.reference`.
"""

from csae import interop
from csae.adam import Adam
from csae.contextual_sae import ContextualSAE
from csae.patches import patch
from csae.sae import SAE, Code, Losses, Output
from csae.splicing import Edit, splice
from csae.topk_sae import TopKSAE

__all__ = ["SAE", "Adam", "Code", "ContextualSAE", "Edit", "Losses", "Output", "TopKSAE", "interop", "patch", "splice"]
__version__ = "0.1.0"
