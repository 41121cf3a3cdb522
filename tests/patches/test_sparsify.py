"""sparsify with the patch against sparsify without it: outputs, gradients, training, files."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch

import csae
from csae.patches.lazy import Lazy

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # where triton is installed it is used, also on a CPU
sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed: `make test-peers` has it")

N, D_IN, D_SAE, K = 37, 20, 84, 7
# Sums in another order.
ROUNDING = {torch.float32: {"rtol": 1e-4, "atol": 2e-6}, torch.float64: {"rtol": 1e-11, "atol": 1e-14}}


def coder(dtype=torch.float32, **config):
    torch.manual_seed(0)
    config = sparsify.SparseCoderConfig(**{"num_latents": D_SAE, "k": K} | config)
    sae = sparsify.SparseCoder(D_IN, config, dtype=dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return sae


def activations(dtype=torch.float32, seed=1):
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dead(share):
    return torch.rand(D_SAE, generator=torch.Generator().manual_seed(2)) < share


def step(sae, dead_share=0.0):
    """All that a training step gives: outputs, and gradients by parameter and of x."""
    x = activations(sae.dtype).requires_grad_()
    y = activations(sae.dtype, seed=3) if sae.cfg.transcode else None
    out = sae(x, y, dead_mask=dead(dead_share) if dead_share else None)
    (out.fvu + 0.3 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
    gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
    # Its codes are in no order.
    order = out.latent_indices.argsort(dim=1)
    codes = {name: getattr(out, name).gather(1, order) for name in ("latent_acts", "latent_indices")}
    return {**out._asdict(), **codes, "d_x": x.grad, **gradients}


def assert_same(found, wanted, dtype=torch.float32):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, **ROUNDING[dtype], msg=lambda text, name=name: f"{name}: {text}"
        )


FORMS = [
    {"multi_topk": multi, "transcode": transcode, "skip_connection": skip}
    for multi, transcode, skip in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize("dead_share", [0, 0.05, 0.9])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(name for name in form if form[name]) or "sae")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_the_same(dtype, form, dead_share, monkeypatch):
    wanted = step(coder(dtype, **form), dead_share)
    monkeypatch.setattr("csae.patches.lazy.Content.dense", lambda self: pytest.fail("it became dense"))
    with csae.patch("sparsify"):
        found = step(coder(dtype, **form), dead_share)
    assert_same(found, wanted, dtype)


def test_groupmax_stays_its_own():
    config = {"activation": "groupmax", "num_latents": D_SAE, "multi_topk": True}
    wanted = step(coder(**config), 0.3)
    with csae.patch("sparsify"):
        found = step(coder(**config), 0.3)
        with pytest.raises(ValueError, match="Unknown activation"):
            coder(activation="relu").encode(activations())
    assert_same(found, wanted)


def test_pre_acts_are_there_when_read():
    wanted = coder().encode(activations())
    with csae.patch("sparsify"):
        found = coder().encode(activations())
    assert type(found) is type(wanted)
    assert isinstance(found.pre_acts, Lazy)
    top = found.top_acts.sort(dim=1)
    torch.testing.assert_close(top.values, wanted.top_acts.sort(dim=1).values)
    torch.testing.assert_close(found.pre_acts.gather(1, found.top_indices), found.top_acts)
    torch.testing.assert_close(found.pre_acts + 0, wanted.pre_acts.detach())
    sae = coder()
    with csae.patch("sparsify"):
        stale = sae.encode(activations()).pre_acts
    torch.optim.SGD(sae.parameters(), lr=1)
    with torch.no_grad():
        sae.encoder.weight.mul_(2)
    with pytest.raises(RuntimeError, match="read the pre-activations before the optimizer's step"):
        stale.sum()


def test_where_few_features_are_positive_only_the_choice_among_zeros_differs():
    def biased():
        sae = coder()
        with torch.no_grad():
            sae.encoder.bias.sub_(2.5)
        return sae

    wanted = step(biased())
    sae = biased()
    with csae.patch("sparsify"):
        found = step(sae)
    assert (wanted["latent_acts"] == 0).any(dim=1).float().mean() > 0.5  # or this tests nothing
    assert (wanted["latent_acts"] > 0).any()
    torch.testing.assert_close(
        found["latent_acts"].sort(dim=1).values, wanted["latent_acts"].sort(dim=1).values, **ROUNDING[torch.float32]
    )
    for name in ("sae_out", "fvu", "W_dec"):
        torch.testing.assert_close(found[name], wanted[name], **ROUNDING[torch.float32])
    # As in the library, a feature that fills up a code at zero has a gradient.
    at_zero = found["latent_indices"][found["latent_acts"] == 0]
    only_at_zero = set(at_zero.tolist()) - set(found["latent_indices"][found["latent_acts"] > 0].tolist())
    assert only_at_zero
    assert (found["encoder.weight"][list(only_at_zero)] != 0).any(dim=1).all()


def test_its_own_test_of_the_encoder_at_awkward_sizes():
    torch.manual_seed(42)
    inputs = [torch.randn(shape).requires_grad_() for shape in ((61, 33), (517, 33), (517,))]
    values, indices = torch.nn.functional.linear(*inputs).relu().topk(K, dim=1)
    wanted = torch.autograd.grad(values.sum(), inputs)
    with csae.patch("sparsify"):
        from sparsify.fused_encoder import fused_encoder

        found = fused_encoder(*inputs, K, "topk")
        gradients = torch.autograd.grad(found.top_acts.sum(), inputs)
    assert fused_encoder.__module__ == "csae.patches.sparsify"
    torch.testing.assert_close(found.top_acts, values)
    assert torch.equal(found.top_indices, indices)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **ROUNDING[torch.float32])


def test_its_own_test_of_the_decoder():
    torch.manual_seed(0)
    values, indices = torch.rand(5, 128).topk(10)
    W_dec = torch.randn(128, 48)
    wanted = sparsify.utils.eager_decode(indices, values, W_dec.mT)
    with csae.patch("sparsify"):
        for given in (indices, indices.int()):
            torch.testing.assert_close(sparsify.utils.decoder_impl(given, values, W_dec.mT), wanted)


def test_under_autocast_only_the_encoders_product_is_of_half_precision():
    found = {}
    for patched in (False, True):
        sae, x = coder(), activations()
        with torch.no_grad():
            # Far enough apart for bfloat16: which features are chosen is not what this tests.
            sae.encoder.weight.zero_()[:D_IN].fill_diagonal_(1)
            sae.encoder.bias.copy_(-torch.linspace(0, 8, D_SAE))
        x = x.mul(0.01).add_(torch.linspace(3, 10, D_IN).flip(0))
        undo = csae.patch("sparsify").undo if patched else lambda: None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = sae(x)
            out.fvu.backward()
        undo()
        found[patched] = SimpleNamespace(out=out, grads={n: p.grad for n, p in sae.named_parameters()})
    mine, theirs = found[True], found[False]
    assert mine.out.latent_acts.dtype == theirs.out.latent_acts.dtype == torch.bfloat16
    assert mine.out.sae_out.dtype == theirs.out.sae_out.dtype == torch.float32
    torch.testing.assert_close(mine.out.sae_out, theirs.out.sae_out, rtol=1e-5, atol=1e-5)
    for name, grad in theirs.grads.items():
        assert mine.grads[name].dtype == grad.dtype
        # Gradients come through half precision in both, once.
        torch.testing.assert_close(mine.grads[name], grad, rtol=1e-2, atol=1e-2 * float(grad.abs().max()))


def test_compiled_it_gives_the_same():
    wanted = coder()(activations())
    with csae.patch("sparsify"):
        sae = coder()
        found = torch.compile(sae, backend="aot_eager")(activations())
    torch.testing.assert_close(found.sae_out, wanted.sae_out, **ROUNDING[torch.float32])
    torch.testing.assert_close(found.fvu, wanted.fvu, **ROUNDING[torch.float32])


def test_files_are_the_same(tmp_path):
    coder().save_to_disk(tmp_path / "without")
    with csae.patch("sparsify"):
        sae = coder()
        step(sae)
        sae.save_to_disk(tmp_path / "with")
        loaded = sparsify.SparseCoder.load_from_disk(tmp_path / "without")
        assert_same({"x": loaded(activations()).sae_out}, {"x": sae(activations()).sae_out})
    for name in ("cfg.json", "sae.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


@pytest.mark.parametrize(("multi_topk", "k_decay_steps"), [(True, 0), (False, 2)])
def test_its_trainer_trains_the_same(multi_topk, k_decay_steps, tmp_path, monkeypatch):
    """Steps with AuxK, dead features and micro-batches, on a tiny language model."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr("torch.set_float32_matmul_precision", lambda precision: None)  # it would stay set
    sizes = {"hidden_size": D_IN, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    tokens = torch.randint(50, (12, 8), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")

    class Double(sparsify.SparseCoder):
        """A step of Adam is lr, whatever the size of a gradient, so that rounding can be a step: little of it."""

        def __init__(self, *sizes, dtype):
            super().__init__(*sizes, dtype=torch.float64)

    monkeypatch.setattr("sparsify.trainer.SparseCoder", Double)
    model.double()

    def train(name):
        config = sparsify.TrainConfig(
            sparsify.SparseCoderConfig(num_latents=640, k=3, multi_topk=multi_topk),
            batch_size=2,
            micro_acc_steps=2,
            optimizer="adam",
            lr=1e-3,
            lr_warmup_steps=0,
            k_decay_steps=k_decay_steps,
            auxk_alpha=1 / 32,
            dead_feature_threshold=20,
            layers=[1],
            log_to_wandb=False,
            save_dir=str(tmp_path / name),
        )
        trainer = sparsify.Trainer(config, data, model)
        trainer.fit()
        (sae,) = trainer.saes.values()
        (fired,) = trainer.num_tokens_since_fired.values()
        return {**dict(sae.named_parameters()), "fired": fired}

    wanted = train("without")
    with csae.patch("sparsify"):
        found = train("with")
    assert (wanted["fired"] > 20).any()
    assert_same(found, wanted, torch.float64)
