"""Our contextual SAE as a class of SAELens, whose registry takes it.

    csae.interop.sae_lens_class.register()
    sae = sae_lens.SAE.load_from_disk(folder)  # that csae.interop.save("sae_lens", contextual_sae, folder) wrote

It takes windows [B, T, d_in] and runs exactly, as `csae.interop.dense.DenseSAE` says. What SAELens can do with an
SAE it can do with this one, in whole passes of a model; hook_sae_acts_pre alone is never called, as pre-activations
[B, T, d_sae] are never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import sae_lens
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from torch import Tensor

from csae.contextual_sae import ContextualSAE
from csae.interop.dense import DenseSAE
from csae.interop.sae_lens import CONTEXTUAL, contextual_tensors


@dataclass
class ContextualSAEConfig(sae_lens.SAEConfig):
    """See `csae.ContextualSAE` for what k and the fields after it mean."""

    k: int = 32
    n_heads: int = 8
    d_head: int = 32
    d_value: int = 64
    d_memory: int = 256
    k_mem: int | None = None
    query: str = "current"
    selection: str = "topk"
    k_max: int | None = None

    @classmethod
    def architecture(cls) -> str:
        return CONTEXTUAL

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, needed in (
            ("normalize_activations", "none"),
            ("reshape_activations", "none"),
            ("apply_b_dec_to_input", True),
        ):
            if getattr(self, field) != needed:
                raise ValueError(f"{field}: given {getattr(self, field)!r}; needed {needed!r} for a contextual SAE")


class SAELensContextualSAE(sae_lens.SAE[ContextualSAEConfig]):
    """A contextual SAE in SAELens: windows [B, T, d_in] -> feature_acts [B, T, d_sae], and back."""

    def initialize_weights(self) -> None:
        cfg = self.cfg
        with torch.device(self.device):
            sae = ContextualSAE(
                cfg.d_in,
                cfg.d_sae,
                cfg.k,
                n_heads=cfg.n_heads,
                d_head=cfg.d_head,
                d_value=cfg.d_value,
                d_memory=cfg.d_memory,
                k_mem=cfg.k_mem,
                query=cfg.query,
                selection=cfg.selection,
                k_max=cfg.k_max,
            )
        self.dense = DenseSAE(sae.to(self.dtype))

    # SAELens takes them for parameters of the SAE itself. W_enc is a view of one.
    W_enc = property(lambda self: self.dense.W_enc)
    b_enc = property(lambda self: self.dense.b_enc)
    W_dec = property(lambda self: self.dense.W_dec)
    b_dec = property(lambda self: self.dense.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        """Windows [B, T, d_in] -> what is new at each position, [B, T, d_sae]."""
        return self.hook_sae_acts_post(self.dense.encode(self.hook_sae_input(x)))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """feature_acts [B, T, d_sae], of `encode`, or an edit or a slice of it -> the reconstruction [B, T, d_in]."""
        return self.hook_sae_recons(self.dense.decode(feature_acts))

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict.clear()
        state_dict.update(contextual_tensors(self.dense.sae))

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        tensors = dict(state_dict)
        tensors["W_enc"] = tensors["W_enc"].mT.contiguous()
        tensors["scale"] = torch.ones_like(tensors["b_dec"][0])
        tensors["tokens_since_fired"] = torch.zeros_like(tensors["b_enc"], dtype=torch.int64)
        state_dict.clear()
        state_dict.update({f"dense.sae.{name}": tensor for name, tensor in tensors.items()})

    def fold_W_dec_norm(self) -> NoReturn:
        raise NotImplementedError(
            "the norms of W_dec's rows can't be folded, as the top k would change: use it as it is"
        )

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> NoReturn:
        raise NotImplementedError("there is no factor to fold: give a contextual SAE activations as they are")

    def fold_activation_whitening(self, *statistics: Tensor) -> NoReturn:
        raise NotImplementedError("there is no whitening to fold: give a contextual SAE activations as they are")


def register() -> None:
    """Make the class known to SAELens. A second call does nothing."""
    if CONTEXTUAL not in SAE_CLASS_REGISTRY:
        sae_lens.register_sae_class(CONTEXTUAL, SAELensContextualSAE, ContextualSAEConfig)
