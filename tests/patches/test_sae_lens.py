"""SAELens patched against itself: outputs, gradients, training, hooks and files are the same."""

import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")

from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.saes import topk_sae  # noqa: E402
from sae_lens.saes.sae import TrainStepInput  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

import csae  # noqa: E402
from csae.patches import lazy  # noqa: E402
from csae.patches.lazy import Lazy, plain  # noqa: E402

D_IN, D_SAE, K, N = 24, 67, 5, 33


def make_sae(training=True, **options):
    """An SAE in no special state: every parameter moved, and decoder rows of many norms."""
    names = ("TopKTrainingSAE", "TopKTrainingSAEConfig") if training else ("TopKSAE", "TopKSAEConfig")
    make, config = (getattr(sae_lens, name) for name in names)
    torch.manual_seed(0)
    sae = make(config(**{"d_in": D_IN, "d_sae": D_SAE, "k": K, **options}))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        sae.W_dec.mul_(torch.rand(sae.cfg.d_sae, 1) + 0.5)
    return sae


def acts(*batch, dtype=torch.float32):
    return torch.randn(*batch or (N,), D_IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def both(run):
    """What `run` gives without the patch and with it."""
    theirs = run()
    with csae.patch("sae_lens"):
        ours = run()
    return ours, theirs


def close(ours, theirs, rounding=None):
    """To rounding, relative to the largest."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.layout == theirs.layout
    ours, theirs = (plain(tensor.detach()).to_dense() for tensor in (ours, theirs))
    scale = float(theirs.abs().max()) if theirs.numel() else 1.0
    rounding = rounding or {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-2}[theirs.dtype]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding * max(scale, 1e-30))


def gradients(sae):
    return {name: parameter.grad for name, parameter in sae.named_parameters() if parameter.grad is not None}


def forward_pass(sae, x, dead=None):
    given = {"sae_in": x, "coefficients": {}, "n_training_steps": 0, "is_logging_step": False}
    return sae.training_forward_pass(TrainStepInput(dead_neuron_mask=dead, **given))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("rescale", [False, True], ids=["", "rescale"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float64"},
        {"apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
        {"k": 1},
        {"k": D_SAE},
        {"d_sae": 512, "k": 32},
    ],
)
def test_a_training_pass(options, rescale, sparse):
    def run():
        sae = make_sae(**options, rescale_acts_by_decoder_norm=rescale, use_sparse_activations=sparse)
        # With sparse activations and norms the library has no backward pass: its dense one is the standard.
        if sparse and rescale and sae.training and topk_sae.TopKTrainingSAE.encode_with_hidden_pre is own:
            sae.activation_fn.use_sparse_activations = False
        out = forward_pass(sae, acts(dtype=sae.dtype))
        found = {"loss": out.loss, "sae_out": out.sae_out, "feature_acts": out.feature_acts.to_dense()}
        found["hidden_pre"] = plain(out.hidden_pre)
        out.loss.backward()
        return found | gradients(sae)

    own = topk_sae.TopKTrainingSAE.encode_with_hidden_pre
    ours, theirs = both(run)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        close(ours[name], theirs[name])


def trainer_of(sae, **options):
    given = {"total_training_samples": 10**5, "train_batch_size_samples": N, "lr": 1e-3, "lr_end": 1e-3}
    return SAETrainer(SAETrainerConfig(**given, device="cpu", **{"autocast": False} | options), sae, iter(()))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_trainer(sparse):
    def run():
        trainer = trainer_of(make_sae(use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse))
        for seed in range(4):
            out = trainer.step(acts() + seed)
            trainer.n_training_steps += 1
        log = trainer.build_train_step_log_dict(out, trainer.n_training_samples)
        counts = trainer.act_freq_scores.to_dense(), trainer.n_forward_passes_since_fired
        return dict(trainer.sae.named_parameters()), counts, out, log

    (ours, our_counts, our_out, our_log), (theirs, their_counts, their_out, their_log) = both(run)
    for name in theirs:
        # Adam moves a weight by its learning rate, also where rounding decides on the gradient's sign.
        assert (ours[name] - theirs[name]).abs().mean() < 1e-6
    assert all(torch.equal(*pair) for pair in zip(our_counts, their_counts, strict=True))
    assert our_out.feature_acts.layout == their_out.feature_acts.layout
    assert our_log == pytest.approx(their_log, rel=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_step_makes_no_dense_tensor(rescale, autocast, monkeypatch):
    trainer = trainer_of(make_sae(rescale_acts_by_decoder_norm=rescale), autocast=autocast)
    monkeypatch.setattr(lazy.Content, "dense", lambda self: pytest.fail("a dense tensor was made"))
    with csae.patch("sae_lens"):
        out = trainer.step(acts())
        trainer.build_train_step_log_dict(out, N)
    assert isinstance(out.feature_acts, Lazy)
    assert out.feature_acts.source is not None
    assert out.hidden_pre.source is not None


@pytest.mark.parametrize("dead", [3, 40, D_SAE])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_dead_neurons(dead, rescale, sparse):
    def run():
        sae = make_sae(rescale_acts_by_decoder_norm=rescale, use_sparse_activations=sparse and not rescale)
        out = forward_pass(sae, acts(), torch.arange(D_SAE) < dead)
        out.loss.backward()
        return gradients(sae) | {name: loss.detach() for name, loss in out.losses.items()}

    ours, theirs = both(run)
    assert theirs["auxiliary_reconstruction_loss"] > 0
    for name in theirs:
        close(ours[name], theirs[name])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 7), (2, 3, 5)])
def test_inference(training, rescale, batch):
    sae = make_sae(training, rescale_acts_by_decoder_norm=rescale)
    x = acts(*batch) if batch else acts(1)[0]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            ours, theirs = both(lambda: (sae(x), sae.encode(x), sae.decode(sae.encode(x))))
        for mine, its in zip(ours, theirs, strict=True):
            close(mine, its)
            assert mine.requires_grad == its.requires_grad


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "rescale_acts_by_decoder_norm": True}]
)
def test_half_precision(options):
    sae = make_sae(training=False, **options, k=D_SAE)  # all of them: what is chosen may differ by rounding
    ours, theirs = both(lambda: (sae(acts()), sae.encode(acts())))
    for mine, its in zip(ours, theirs, strict=True):
        close(mine, its)


class OneDtype(TorchDispatchMode):
    """Each op of ours gets floating tensors of one dtype: kernels for GPUs are for that."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "csae":
            assert len({arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()}) == 1
        return func(*args, **(kwargs or {}))


def exact(sae):
    """The same SAE in float64."""
    return copy.deepcopy(sae).to(dtype=torch.float64)


def told_apart(sae):
    """The tokens whose k largest pre-activations half precision tells from the others."""
    everything = exact(sae)
    everything.activation_fn = torch.nn.Identity()
    with torch.no_grad():
        pre_acts = everything.encode(acts())
    first = pre_acts.sort(dim=-1, descending=True).values[:, : K + 1]
    apart = first[:, K - 1] - first[:, K] > 0.01 * first[:, 0]
    assert apart.sum() > N / 2
    return acts()[apart]


def autocast_pass(sae, x, dead, dtype=torch.bfloat16):
    """A training pass under autocast, or in float64."""
    with torch.autocast("cpu", dtype=dtype, enabled=sae.dtype == torch.float32):
        out = forward_pass(sae, x.to(sae.dtype), dead)
    out.loss.backward()
    found = {name: getattr(out, name) for name in ("loss", "sae_out", "feature_acts", "hidden_pre")}
    return {name: plain(tensor.detach()).to_dense() for name, tensor in (found | gradients(sae)).items()}


def no_further(ours, theirs, truth, dtype=torch.bfloat16):
    """The same tensors as the library's, and about as near to what float64 gives."""
    assert ours.keys() == theirs.keys() == truth.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        our_error, their_error = ((found[name] - truth[name]).norm() for found in (ours, theirs))
        assert our_error <= 2 * their_error + torch.finfo(dtype).eps / 4 * truth[name].norm(), name
    assert torch.equal(ours["hidden_pre"], theirs["hidden_pre"])
    assert torch.equal(ours["feature_acts"] > 0, theirs["feature_acts"] > 0)
    assert torch.equal(ours["feature_acts"] > 0, truth["feature_acts"] > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dead", [0, 3])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("rescale", [False, True], ids=["", "rescale"])
@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": False}])
def test_autocast(options, rescale, sparse, dead, dtype):
    sae = make_sae(**options, rescale_acts_by_decoder_norm=rescale, use_sparse_activations=sparse)
    x, is_dead = told_apart(sae), torch.arange(D_SAE) < dead
    # With sparse activations and norms the library has no backward pass: its dense one is the standard.
    dense = make_sae(**options, rescale_acts_by_decoder_norm=rescale, use_sparse_activations=sparse and not rescale)
    theirs, truth = (autocast_pass(standard, x, is_dead, dtype) for standard in (dense, exact(dense)))
    with csae.patch("sae_lens"):
        no_further(autocast_pass(sae, x, is_dead, dtype), theirs, truth, dtype)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("rescale", [False, True], ids=["", "rescale"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [(-1,), (1, -1), (1, 1, -1)])
def test_inference_under_autocast(training, rescale, sparse, batch):
    """Each tensor that passes from function to function is of the library's dtype."""
    options = {"use_sparse_activations": sparse} if training else {}
    sae = make_sae(training, rescale_acts_by_decoder_norm=rescale, **options)
    x = told_apart(sae).view(*batch, D_IN)

    def run():
        code = sae.encode(x)
        return sae(x), code, sae.decode(code), topk_sae.act_times_W_dec(code, sae.W_dec, rescale)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = both(run)
    for mine, its in zip(ours, theirs, strict=True):
        close(mine, its, 3e-2)
    assert isinstance(ours[1], Lazy) or ours[1].is_sparse


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_trainers_step_under_autocast(sparse, monkeypatch):
    def run():
        trainer = trainer_of(make_sae(use_sparse_activations=sparse, rescale_acts_by_decoder_norm=False), autocast=True)
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda: None)
        out = trainer.step(told_apart(trainer.sae))
        log = trainer.build_train_step_log_dict(out, trainer.n_training_samples)
        return gradients(trainer.sae), trainer.act_freq_scores.to_dense(), out.sae_out, log

    (ours, our_counts, our_out, our_log), (theirs, their_counts, their_out, their_log) = both(run)
    assert len(theirs) == 4
    for name in theirs:
        close(ours[name], theirs[name], 3e-2)
    assert torch.equal(our_counts, their_counts)
    close(our_out, their_out, 3e-2)
    assert our_log == pytest.approx(their_log, rel=3e-2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_the_gradient_of_activations_and_inputs(rescale, autocast):
    """Attribution: by x, by the code, and by all of the features, active or not."""

    def run():
        sae = make_sae(rescale_acts_by_decoder_norm=rescale)
        x = told_apart(sae).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            code = sae.encode(x)
            code.retain_grad()
            out = sae.decode(code)
            loss = (out - 1).square().sum() + 0.1 * code.abs().sum() + (code * code.detach()).sum()
            by_code, by_x = torch.autograd.grad(loss, [code, x], retain_graph=True)
            (by_one,) = torch.autograd.grad(out[3].sum(), code, retain_graph=True)
            loss.backward()
        return [by_code, by_x, by_one, code.grad, x.grad, *gradients(sae).values()]

    with OneDtype():
        found = both(run)
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, 3e-2 if autocast else None)


def test_a_sparse_tensor_of_a_users_own():
    """Entries in any order, in two parts, and not as many for each token: the library's code takes those."""

    def run():
        sae, found = make_sae(rescale_acts_by_decoder_norm=False), []
        for places in ([[0, 0, 1, 1], [3, 5, 2, 9]], [[1, 0, 1, 0], [3, 5, 2, 9]], [[0, 0, 1, 1], [3, 3, 2, 9]]):
            values = torch.arange(1.0, 5).requires_grad_()
            out = sae.decode(torch.sparse_coo_tensor(places, values, (2, D_SAE)))
            out.square().sum().backward()
            found += [out, values.grad]
        return [*found, sae.decode(torch.sparse_coo_tensor(([0], [4]), [2.0], (3, D_SAE))), *gradients(sae).values()]

    for ours, theirs in zip(*both(run), strict=True):
        close(ours, theirs)


def test_an_intervention_on_the_code():
    def run():
        sae = make_sae(training=False)
        with torch.no_grad():
            code = sae.encode(acts())
            code[:, 7] = 3
            code[4] *= 2
            changed = sae.decode(code)
        code = sae.encode(acts())
        mask = torch.arange(D_SAE) % 2 == 0
        out = sae.decode(code * mask) + sae.decode(code)
        out.square().sum().backward()
        return [changed, out, *gradients(sae).values()]

    for ours, theirs in zip(*both(run), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_hooks_get_ordinary_dense_tensors(training, sparse):
    options = {"use_sparse_activations": True} if training and sparse else {}
    sae = make_sae(training, rescale_acts_by_decoder_norm=False, **options)

    def change(value, hook):
        assert type(value) in (torch.Tensor, torch.nn.Parameter)
        return value + 1 if hook.name == "hook_sae_acts_post" else value * 2

    for names in (
        ["hook_sae_input"],
        ["hook_sae_acts_pre"],
        ["hook_sae_acts_post"],
        ["hook_sae_recons", "hook_sae_output"],
    ):
        hooks = [(name, change) for name in names]
        close(*both(lambda hooks=hooks: sae.run_with_hooks(acts(), fwd_hooks=hooks)))
    ours, theirs = both(lambda: sae.run_with_cache(acts())[1])
    assert list(ours) == list(theirs)
    for name in theirs:
        close(ours[name], theirs[name])


@pytest.mark.parametrize("name", ["hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"])
def test_backward_hooks(name):
    def run():
        sae, seen = make_sae(), []
        getattr(sae, name).add_hook(lambda grad, hook: seen.append(grad[0] if type(grad) is tuple else grad), dir="bwd")
        sae(acts()).square().sum().backward()
        return seen + list(gradients(sae).values())

    for ours, theirs in zip(*both(run), strict=True):
        close(ours, theirs)


def test_the_error_term():
    sae = make_sae(training=False)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    close(*both(lambda: sae(acts())))


def test_hidden_pre_of_weights_that_have_changed_is_refused():
    trainer = trainer_of(make_sae())
    with csae.patch("sae_lens"):
        out = trainer.step(acts())
    with pytest.raises(RuntimeError, match="the weights have changed"):
        out.hidden_pre.sum()
    assert out.feature_acts.sum() > 0  # these are known for good


def test_files_are_the_same(tmp_path):
    def run():
        trainer = trainer_of(make_sae())
        trainer.step(acts())
        where = tmp_path / str(len(list(tmp_path.iterdir())))
        trainer.sae.save_model(where)
        trainer.sae.save_inference_model(where / "inference")
        loaded = sae_lens.SAE.load_from_disk(where / "inference", device="cpu")
        configs = [json.loads(path.read_text()) for path in sorted(where.rglob("cfg.json"))]
        return configs, loaded.state_dict(), loaded(acts())

    (our_configs, ours, our_out), (their_configs, theirs, their_out) = both(run)
    assert our_configs == their_configs
    assert list(ours) == list(theirs)
    torch.testing.assert_close(our_out, their_out, rtol=0, atol=1e-4)


def batch_sae(name, k=K, spread=0.0):
    """spread: how much larger each token's activations are than those of the one before."""
    torch.manual_seed(0)
    widths = {"matryoshka_widths": [20, D_SAE]} if name.startswith("Matryoshka") else {}
    sae = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, k=k, **widths))
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn_like(sae.W_enc))
        sae.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
    return sae, acts() * (1 + spread) ** torch.arange(N).unsqueeze(1)


@pytest.mark.parametrize("name", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"])
@pytest.mark.parametrize("k", [0.5, 3.3, K, 60])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_what_chooses_over_the_batch(name, k, spread):
    """Where some tokens have far more than others, too: there the code can't be told from each token's largest."""

    def run():
        sae, x = batch_sae(name, k, spread)
        out = forward_pass(sae, x, torch.arange(D_SAE) < 4)
        out.loss.backward()
        return gradients(sae) | {"acts": out.feature_acts, "out": out.sae_out}, float(sae.topk_threshold)

    (ours, our_threshold), (theirs, their_threshold) = both(run)
    assert our_threshold == pytest.approx(their_threshold, rel=1e-5, abs=1e-8)
    for name in theirs:
        close(ours[name], theirs[name])


def test_what_chooses_over_the_batch_under_autocast():
    sae, _ = batch_sae("BatchTopKTrainingSAE")
    x, dead = acts()[:8], torch.arange(D_SAE) < 3
    everything = exact(sae)
    everything.activation_fn = torch.nn.Identity()
    with torch.no_grad():
        pre_acts = everything.encode(x).flatten().sort(descending=True).values
    gaps = pre_acts[30:50] - pre_acts[31:51]
    assert gaps.max() > 0.01 * pre_acts[0]  # half precision tells apart what is on the two sides
    sae.activation_fn.k = (31 + int(gaps.argmax()) + 0.5) / 8
    ours, theirs = both(lambda: autocast_pass(copy.deepcopy(sae), x, dead))
    no_further(ours, theirs, autocast_pass(exact(sae), x, dead))


def test_a_step_over_the_batch_makes_no_dense_tensor(monkeypatch):
    sae, x = batch_sae("BatchTopKTrainingSAE")
    monkeypatch.setattr(lazy.Content, "dense", lambda self: pytest.fail("a dense tensor was made"))
    with csae.patch("sae_lens"):
        out = trainer_of(sae).step(x)
    assert isinstance(out.feature_acts, Lazy)


def test_a_token_with_too_many_of_the_batch_is_left_to_the_library():
    sae, x = batch_sae("BatchTopKTrainingSAE", k=2, spread=0.3)
    ours, theirs = both(lambda: forward_pass(sae, x))
    assert (theirs.feature_acts > 0).sum(-1).max() > 16
    assert type(ours.feature_acts) is torch.Tensor
    close(ours.feature_acts, theirs.feature_acts)


def test_what_is_not_ours_stays_the_librarys():
    """Autocast of another dtype's, compilation, torch.func, another activation function, a k that is too large."""

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [make_sae(dtype=dtype, use_sparse_activations=False)(acts()) for dtype in ("float64", "bfloat16")]
        found.append(torch.func.grad(lambda x: make_sae(training=False)(x).square().sum())(acts()))
        other = make_sae()
        other.activation_fn = torch.nn.ReLU()
        return [*found, other(acts()), torch.compile(make_sae(training=False), backend="eager")(acts())]

    ours, theirs = both(run)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    with csae.patch("sae_lens"), pytest.raises(RuntimeError, match="out of range"):
        make_sae(k=D_SAE + 1)(acts())


def test_a_copy_and_an_sae_made_before_are_patched_and_undo_takes_it_back():
    sae = make_sae(training=False)
    own = topk_sae.TopKSAE.encode
    with csae.patch("sae_lens"):
        assert isinstance(sae.encode(acts()), Lazy)
        assert isinstance(copy.deepcopy(sae).encode(acts()), Lazy)
    assert topk_sae.TopKSAE.encode is own
    assert type(sae.encode(acts())) is torch.Tensor
