"""A world of one rank, whose collectives are called all the same: of NCCL on a GPU, which needs one of its own a rank.

On a CPU it is gloo. `make gpu` runs this file where there are torch and pytest alone.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist

from csae import SAE, Adam, ContextualSAE, TopKSAE
from csae.bench.scale_count import Collectives, purpose
from csae.distributed import Ranks, collectives, sharded
from csae.distributed.ranks import ranks_of_world
from csae.distributed.replicas import check_replicas
from csae.outputs import Code
from csae.rounded import copy_of

D_IN, D_SAE, K, B, T = 48, 520, 8, 3, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])])
def ranks(request, tmp_path, monkeypatch):
    device = torch.device("cpu") if request.param == "cpu" else torch.device("cuda", 0)
    own = device if device.type == "cuda" else None
    backend = "nccl" if own else "gloo"
    store = f"file://{tmp_path}/rendezvous"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1, device_id=own)
    monkeypatch.setattr(collectives, "_is_alone", lambda group: False)
    yield ranks_of_world(device, timedelta(seconds=60))
    dist.destroy_process_group()


def test_collectives(ranks: Ranks) -> None:
    group = ranks.features
    for dtype in DTYPES:
        x = torch.arange(6, device=ranks.device).view(2, 3).T.to(dtype)  # not contiguous
        with Collectives(purpose) as counted:
            both = collectives.gather(x, group), collectives.exchange(x.unsqueeze(0), group)
        assert {one.kind for one in counted.sent} == {"all-gather", "all-to-all"}
        for found in both:
            assert found.device == ranks.device
            assert torch.equal(found, x.unsqueeze(0))
    for n in (7, collectives.SMALL_BYTES):  # both ways to a sum
        numbers = torch.randn(n, device=ranks.device)
        assert torch.equal(collectives.total(numbers, group), numbers)
        assert torch.equal(collectives.sum_home(numbers.unsqueeze(0), group), numbers)


def make(arch: str) -> SAE:
    torch.manual_seed(0)
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "k_aux": 6, "dead_after": 50}
    if arch == "topk":
        return TopKSAE(**sizes)
    return ContextualSAE(**sizes, n_heads=2, d_head=16, d_value=16, d_memory=32, query=arch)


def train(sae: SAE, autocast: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What four steps leave, from the second on with AuxK."""
    device = sae.W_dec.device
    optimizer = Adam(sae, 1e-2)
    random = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(4):
        acts = torch.randn(B, T, D_IN, generator=random).to(device)
        mask = (torch.rand(B, T, generator=random) < 0.9).to(device)
        documents = torch.zeros(B, T, dtype=torch.int64, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            found, gradients = sae.gradients(acts, mask, documents, sae.dead_features())
        optimizer.update(gradients)
        sae.track(found.code, mask)
        losses.append(found.loss.item())
    check_replicas(sae, optimizer)
    return {name: tensor.cpu() for name, tensor in sae.state_dict().items()}, losses


@pytest.mark.parametrize(("arch", "autocast"), list(product(("topk", "current", "past"), (False, True))))
def test_a_step_has_the_bits_of_one_device(ranks: Ranks, arch: str, autocast: bool) -> None:
    whole, losses = train(make(arch).to(ranks.device), autocast)
    own, found = train(sharded(lambda: make(arch), ranks).to(ranks.device), autocast)
    assert found == losses
    assert whole.keys() == own.keys()
    assert [name for name in whole if not torch.equal(whole[name], own[name])] == []


@pytest.mark.parametrize("arch", ["topk", "past"])
def test_copies_of_own_rows_train_the_same(ranks: Ranks, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16: `Adam.copies` of a sharded SAE's own rows, as where the kernel writes them."""
    found = []
    for kept in (True, False):
        monkeypatch.setattr("csae.rounded.kept", lambda table, kept=kept: kept)
        sae = sharded(lambda: make(arch), ranks).to(ranks.device)
        optimizer = Adam(sae, lr=1e-2)
        for step in range(3):
            acts = torch.randn(B, T, D_IN, generator=torch.Generator().manual_seed(step)).to(ranks.device)
            with optimizer.copies.used(), torch.autocast(ranks.device.type, torch.bfloat16):
                gradients = sae.gradients(acts)[1]
            optimizer.update(gradients)
        with optimizer.copies.used(), torch.autocast(ranks.device.type, torch.bfloat16):
            for name in ("W_enc", "b_enc", "W_dec"):
                copy = copy_of(name, getattr(sae, name))
                assert (copy is not None) == kept
                assert copy is None or torch.equal(copy, getattr(sae, name).detach().bfloat16())
        found.append(list(sae.parameters()))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_nan_fires_as_on_one_device(ranks: Ranks) -> None:
    """So that a feature that broke is not taken for a dead one."""
    values, indices = torch.tensor([[[torch.nan, 1.0, 0.0]]]), torch.tensor([[[3, 5, 7]]])
    since = []
    for sae in (make("topk"), sharded(lambda: make("topk"), ranks)):
        sae.to(ranks.device).track(Code(values.to(ranks.device), indices.to(ranks.device)))
        since.append(sae.tokens_since_fired.cpu())
    assert torch.equal(*since)
    assert since[0][[3, 5, 7]].tolist() == [0, 0, 1]
