"""The text and the SAEs of the tests of `csae view`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_model import PROSE

from csae import ContextualSAE
from csae.pages.view import Window
from csae.pages.view_page import write_view
from csae.sae import SAE

LAYER, N_CTX, D_SAE, K = 2, 40, 90, 5
TEXT = PROSE + "Quelqu'un ouvrit la vanne — « enfin » !\n\n日本語も。\n" + PROSE[:60]


ABOUT = {"text": "mill & <b>.txt", "run": "strict", "beside": "topk", "model": "tiny", "place": f"layer {LAYER}"}
ABOUT |= {"n_ctx": N_CTX, "trained_on": 10, "whole": True}


def fitted(sae: SAE, windows: list[Window]) -> SAE:
    """With weights that make it carry a lot, unequally."""
    acts = torch.cat([window.acts[window.mask] for window in windows])
    sae.initialise(acts.mean(dim=0), float(acts.std()))
    if isinstance(sae, ContextualSAE):
        with torch.no_grad():
            sae.W_O.mul_(8)
            sae.W_mem.mul_(torch.linspace(0.1, 3, D_SAE)[:, None])
    return sae.eval()


def pairs(flat: list[int]) -> dict[int, int]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def page(path: Path, facts: dict[str, Any], **about: Any) -> str:
    write_view(path, ABOUT | about, facts)
    return path.read_text(encoding="utf-8")
