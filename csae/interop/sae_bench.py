"""An SAE of ours as SAEBench takes custom ones, for any of its evaluations that encode whole windows.

sae = SAEBenchSAE(csae.checkpoint.load_sae("runs/contextual"), model_name="pythia-70m-deduped", hook_layer=3)
sae_bench.evals.core.main.multiple_evals(selected_saes=[("contextual", sae)], ...)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from csae.contextual_sae import ContextualSAE
from csae.interop.dense import DenseSAE
from csae.interop.weights import unscaled
from csae.topk_sae import TopKSAE
from csae.trained_on import check_place, named_in


@dataclass
class SAEBenchConfig:
    """What SAEBench reads of an SAE's config; it adds fields of its own."""

    model_name: str
    hook_layer: int
    hook_name: str
    d_in: int
    d_sae: int
    k: int
    architecture: str
    dtype: str
    device: str
    context_size: int | None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SAEBenchSAE(DenseSAE):
    """SAEBench's interface: encode, decode, forward, W_enc, b_enc, W_dec, b_dec, cfg, device and dtype.

    Feature activations are in units of the activations, and the rows of `W_dec` are of unit norm as they were trained.

    A contextual SAE takes windows [B, T, d_in], as core, sparse probing, SCR, TPP, unlearning and autointerp hand
    them over. Absorption, RAVEL and MDL encode single positions: they are refused with a message. Keep prepend_bos,
    and set exclude_special_tokens_from_reconstruction, so that position 0 of a window, which no SAE of ours was
    trained on, does not count. `DenseSAE` says what `decode` adds, and what happens to other attention sinks. The
    exact form runs in float32: evaluate with dtype="float32".

    Args:
        sae: a trained one; it is copied.
        model_name: the language model, as TransformerLens names it.
        hook_layer: of TransformerLens: what `csae train --layer 12` was trained on is hook_layer 11.
        hook_name: where the activations come from; the residual stream after that layer if not given.
        context_size: tokens in a window, for the evaluations that ask the SAE for it.
        elsewhere: evaluate it also at another model, layer or hook point than it was trained on.
    """

    def __init__(
        self,
        sae: TopKSAE | ContextualSAE,
        model_name: str,
        hook_layer: int,
        hook_name: str | None = None,
        context_size: int | None = None,
        elsewhere: bool = False,
    ) -> None:
        if hook_layer < 0:
            raise ValueError(f"hook_layer: given {hook_layer}; needed 0 or more")
        named = named_in({"model_name": model_name, "hook_name": hook_name, "hook_layer": hook_layer})
        assert named is not None
        check_place(sae.trained_on, named.model, named.layer, named.hook, elsewhere)
        super().__init__(unscaled(sae).eval())
        self.cfg = SAEBenchConfig(
            model_name=model_name,
            hook_layer=hook_layer,
            hook_name=hook_name or f"blocks.{hook_layer}.hook_resid_post",
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            k=sae.k,
            architecture=f"csae_{sae.arch}",
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            context_size=context_size,
        )
