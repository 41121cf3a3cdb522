"""SAEs that the tests of other libraries' files share, and how their outputs are compared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from csae import SAE, ContextualSAE, TopKSAE, reference
from csae.data.activations import sink_mask

D_IN, D_SAE, K = 7, 19, 3  # no two alike, no multiple of a block


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test where the package can't be imported."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def topk(scale: float = 1.0, k: int = K, dtype: torch.dtype = torch.float32) -> TopKSAE:
    """With biases, and rows of W_dec as a trained one has them: unit, and no longer those of W_enc."""
    torch.manual_seed(0)
    return _perturbed(TopKSAE(D_IN, D_SAE, k), scale).to(dtype)


def with_thresholds(selection: str, scale: float = 1.0, **options: object) -> TopKSAE:
    """One that selects by a threshold ("batch"), or by one a feature ("jumprelu")."""
    torch.manual_seed(0)
    sae = _perturbed(TopKSAE(D_IN, D_SAE, K, selection=selection, **options), scale)  # type: ignore[arg-type]
    assert sae.threshold is not None
    with torch.no_grad():
        sae.threshold.copy_(0.3 + torch.rand_like(sae.threshold))
    return sae.eval()


def contextual(query: str = "current", scale: float = 1.0, **options: object) -> ContextualSAE:
    """One that carries a good part of what it reconstructs."""
    torch.manual_seed(0)
    options = {"n_heads": 2, "d_head": 3, "d_value": 4, "d_memory": 5, "k_mem": 2, "query": query} | options
    sae = _perturbed(ContextualSAE(D_IN, D_SAE, K, **options), scale)  # type: ignore[arg-type]
    with torch.no_grad():
        sae.W_O.mul_(5)
        sae.null.sub_(1)
    return sae.eval()


def _perturbed(sae: SAE, scale: float) -> SAE:
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter += 0.3 * torch.randn_like(parameter)
        sae.scale.fill_(scale)
    return sae


def activations(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(1))


def assert_same_sae(found: SAE, wanted: SAE) -> None:
    """The same parameters and sizes, to the bit."""
    assert type(found) is type(wanted)
    assert {**found.config, "dead_after": 0} == {**wanted.config, "dead_after": 0}
    for name, parameter in wanted.named_parameters():
        assert found.get_parameter(name).dtype == parameter.dtype, name
        assert torch.equal(found.get_parameter(name), parameter), name
    assert found.scale == wanted.scale == 1


def assert_same_files(folder: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def dense(sae: SAE, acts: Tensor) -> Tensor:
    """The code of a TopKSAE as other libraries give it: [..., d_sae], in units of the activations."""
    code = sae.encode(acts)  # type: ignore[operator]
    return torch.zeros(*acts.shape[:-1], sae.d_sae).scatter_add(-1, code.indices, code.values * sae.scale)


def dense_windows(sae: ContextualSAE, windows: Tensor) -> tuple[Tensor, Tensor]:
    """What other libraries are to get of a contextual SAE: feature activations [B, T, d_sae], reconstruction.

    Positions that the mask leaves out are those of a per-token SAE.
    """
    mask = sink_mask(windows)
    out = sae(windows, mask)
    assert not out.c[~mask].any()
    assert out.c[mask].abs().max() > 0.5
    weights = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    alone = reference.topk_sae(windows[~mask] / sae.scale, *weights, sae.k)
    values, indices, x_hat = out.code.values.clone(), out.code.indices.clone(), out.x_hat.clone()
    values[~mask], indices[~mask], x_hat[~mask] = alone.values, alone.indices, alone.x_hat * sae.scale
    dense = torch.zeros(*windows.shape[:-1], sae.d_sae)
    return dense.scatter(-1, indices, values * sae.scale), x_hat
