"""dictionary_learning with the patch against dictionary_learning without it: outputs, gradients, training, files."""

import copy
import json
import sys

import pytest
import torch
from torch.nn.functional import linear

import csae
from csae.patches.batch_topk import ROOM
from csae.patches.lazy import Lazy

pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed: `make test-peers` has it")
# It imports nnsight, which replaces functions of torch: torch.compile no longer works then.
if hasattr(sys.modules.get("nnsight"), "DEFAULT_PATCHER"):
    sys.modules["nnsight"].DEFAULT_PATCHER.__exit__(None, None, None)
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers import batch_top_k, top_k
from dictionary_learning.training import log_stats, trainSAE

N, D_IN, D_SAE, K = 37, 20, 384, 5
SAES = {"topk": top_k.AutoEncoderTopK, "batch": batch_top_k.BatchTopKSAE}
TRAINERS = {"topk": top_k.TopKTrainer, "batch": batch_top_k.BatchTopKTrainer}
# Sums in another order, of float64.
ROUNDING = {"rtol": 1e-11, "atol": 1e-13}
KINDS = pytest.mark.parametrize("kind", ["topk", "batch"])


def sae(kind="topk", **options):
    torch.manual_seed(0)
    return perturbed(SAES[kind](D_IN, options.pop("dict_size", D_SAE), K))


def perturbed(ae):
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return ae.double()


def trainer(kind, dead_share=0.0, **options):
    """In the middle of training, on float64."""
    config = {"steps": 1000, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 1, "lm_name": "m", "seed": 5}
    found = TRAINERS[kind](**config | {"device": "cpu", "lr": 1e-3, "warmup_steps": 0, "decay_start": 900} | options)
    torch.manual_seed(1)
    perturbed(found.ae)
    found.threshold_start_step = 1
    found.num_tokens_since_fired[torch.rand(D_SAE) < dead_share] = found.dead_feature_threshold + N
    return found


def activations(seed=2, *shape):
    return torch.randn(*(shape or (N,)), D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, **ROUNDING)


@pytest.fixture(autouse=True)
def sparse_decoder(monkeypatch):
    """So few tokens as are here are decoded sparsely, too."""
    monkeypatch.setattr("csae.patches.features.FEW_TOKENS", 0)


@pytest.fixture
def never_dense(monkeypatch):
    """A test in which nothing [n, d_sae] is read."""
    monkeypatch.setattr("csae.patches.lazy.Content.dense", lambda self: pytest.fail("it became dense"))


@pytest.fixture
def float64():
    """A test in which modules are made of float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- a training step -------------------------------------------------------------------------------------------------


def train(kind, dead_share, steps):
    """All that steps leave: losses, weights and moments, thresholds, counts, what is logged; and the first gradient."""
    own = trainer(kind, dead_share)
    own.loss(activations(), step=2).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in own.ae.named_parameters()}
    own = trainer(kind, dead_share)
    # From the first step, which takes b_dec from the data, to those which keep up a threshold.
    losses, logged = [], []
    for step in range(steps):
        losses.append(own.update(step, activations(step)))
        logged.append({name: torch.as_tensor(value).item() for name, value in own.get_logging_parameters().items()})
    moments = [state["exp_avg_sq"] for state in own.optimizer.state.values()]
    return losses, gradients, own.ae.state_dict(), moments, own.num_tokens_since_fired, logged


@pytest.mark.parametrize("dead_share", [0, 0.02, 0.5])
@KINDS
def test_training_is_the_same(kind, dead_share, never_dense):
    wanted = train(kind, dead_share, steps=4)
    with csae.patch("dictionary_learning"):
        found = train(kind, dead_share, steps=4)
    assert wanted[2]["threshold"] > 0
    assert (wanted[-1][0]["pre_norm_auxk_loss"] > 0) == (dead_share > 0)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)


@KINDS
def test_a_step_of_float32_agrees_to_rounding(kind):
    def gradients():
        own = trainer(kind)
        own.ae.float()
        loss = own.loss(activations().float(), step=2)
        loss.backward()
        return {"loss": loss} | {name: parameter.grad for name, parameter in own.ae.named_parameters()}

    wanted = gradients()
    with csae.patch("dictionary_learning"):
        found = gradients()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6 * float(tensor.detach().abs().max()))


@KINDS
def test_layouts_of_parameters_gradients_and_moments_stay(kind):
    def strides():
        own = trainer(kind)
        own.loss(activations(), step=2).backward()
        found = [(parameter.stride(), parameter.grad.stride()) for parameter in own.ae.parameters()]
        own.update(3, activations())
        return found, [state["exp_avg"].stride() for state in own.optimizer.state.values()]

    wanted = strides()
    with csae.patch("dictionary_learning"):
        assert strides() == wanted


def test_the_projection_is_the_librarys():
    torch.manual_seed(0)
    W_dec, gradient = torch.randn(2, D_IN, D_SAE, dtype=torch.float64)
    wanted = top_k.remove_gradient_parallel_to_decoder_directions(W_dec, gradient.clone(), D_IN, D_SAE)
    with csae.patch("dictionary_learning"):
        found = top_k.remove_gradient_parallel_to_decoder_directions(W_dec, gradient, D_IN, D_SAE)
    assert found is gradient  # in place
    close(found, wanted)


@KINDS
def test_what_is_logged_is_the_same(kind, capsys):
    def log():
        own = trainer(kind, dead_share=0.1)
        log_stats([own], 3, activations(), False, False, verbose=True)
        x, x_hat, f, losses = own.loss(activations(), step=3, logging=True)
        return x, x_hat, f + 0, (f != 0).sum(dim=1), losses, capsys.readouterr().out.split()[-1][:8]

    wanted = log()
    with csae.patch("dictionary_learning"):
        found = log()
    assert found[-1] == wanted[-1]
    for mine, theirs in zip(found[:-1], wanted[:-1], strict=True):
        close(mine, theirs)


def test_train_sae_leaves_the_same_files(tmp_path, float64):
    def run(folder):
        shared = {"activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 1, "lm_name": "m", "device": "cpu"}
        shared |= {"steps": 6, "lr": 1e-3, "warmup_steps": 0, "seed": 5, "threshold_start_step": 1}
        configs = [{"trainer": of, **shared} for of in TRAINERS.values()]
        data = [activations(seed) for seed in range(6)]
        options = {"save_steps": [2], "save_dir": str(folder), "normalize_activations": True, "device": "cpu"}
        trainSAE(data, configs, 6, autocast_dtype=torch.float64, **options)

    run(tmp_path / "without")
    with csae.patch("dictionary_learning"):
        run(tmp_path / "with")
    files = sorted(path.relative_to(tmp_path / "without") for path in (tmp_path / "without").rglob("*.*"))
    assert len(files) == 6
    for name in files:
        mine, theirs = tmp_path / "with" / name, tmp_path / "without" / name
        if name.suffix == ".json":
            assert json.loads(mine.read_text()) == json.loads(theirs.read_text())
            continue
        found, wanted = (torch.load(path, weights_only=True) for path in (mine, theirs))
        assert found.keys() == wanted.keys()
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11)
        assert [of.stride() for of in found.values()] == [of.stride() for of in wanted.values()]


# --- encode, forward -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N,), (2, 5), (0,), ()])
def test_encode_gives_an_ordinary_dense_tensor_and_forward_needs_none(shape, monkeypatch):
    """But where there are too few tokens."""
    x = activations(3, *shape) if shape else activations()[0]
    ae = sae()
    features, x_hat = ae.encode(x), ae(x)
    with csae.patch("dictionary_learning"):
        assert type(ae.encode(x)) is torch.Tensor
        close(ae.encode(x), features)
        with monkeypatch.context() as patch:
            patch.setattr("csae.patches.features.FEW_TOKENS", N + 1)
            close(ae(x), x_hat)
        monkeypatch.setattr("csae.patches.lazy.Content.dense", lambda self: pytest.fail("it became dense"))
        close(ae(x), x_hat)


def test_return_topk_gives_all_four():
    ae = sae()
    wanted = ae.encode(activations(), return_topk=True)
    with csae.patch("dictionary_learning"):
        found = ae.encode(activations(), return_topk=True)
    assert [type(of) for of in found] == [Lazy, torch.Tensor, torch.Tensor, Lazy]
    order, own_order = found[2].argsort(dim=1), wanted[2].argsort(dim=1)
    for mine, theirs in ((found[1], wanted[1]), (found[2], wanted[2])):
        close(mine.gather(1, order), theirs.gather(1, own_order))
    close(found[0] + 0, wanted[0])
    close(found[3] + 0, wanted[3])


@pytest.mark.parametrize("options", [{"use_threshold": True}, {"use_threshold": True, "return_topk": True}])
def test_a_threshold_is_the_librarys_own(options):
    ae = sae()
    ae.threshold.fill_(0.4)
    wanted = ae.encode(activations(), **options)
    with csae.patch("dictionary_learning"):
        found = ae.encode(activations(), **options)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


def threshold_for(ae):
    """What K of the features of a token exceed, in the mean."""
    return ae.encode(activations(), use_threshold=False).flatten().topk(N * K).values[-1].item()


@pytest.mark.parametrize("shape", [(N,), (2, 5), (0,)])
def test_batch_topk_in_use_is_the_same_by_its_threshold(shape, never_dense):
    ae = sae("batch")
    ae.threshold.fill_(threshold_for(ae))
    x = activations(2, *shape).requires_grad_()

    def results():
        x_hat = ae(x)
        gradients = torch.autograd.grad(x_hat.square().sum(), [x, *ae.parameters()])
        return x_hat, *gradients

    wanted = *results(), ae.encode(x)
    with csae.patch("dictionary_learning"):
        found = results()
    for mine, theirs in zip(found, wanted[:-1], strict=True):
        close(mine, theirs)


def test_what_batch_topk_in_use_gives_is_the_same():
    ae = sae("batch")
    ae.threshold.fill_(threshold_for(ae))
    with torch.no_grad():
        x_hat, features = ae(activations(), output_features=True)
        encoded, active, _ = ae.encode(activations(), return_active=True)
        l0 = (features > 0).sum(dim=1)
        with csae.patch("dictionary_learning"):
            found = ae(activations(), output_features=True)
            again, found_active, pre = ae.encode(activations(), return_active=True)
            assert type(ae.encode(activations())) is torch.Tensor
            close(pre + 0, torch.relu(ae.encoder(activations() - ae.b_dec)))
    assert l0.min() < l0.max() <= 8 * K  # or this tests nothing
    close(found[0], x_hat)
    close(found[1], features)
    close(again + 0, encoded)
    assert torch.equal(found_active, active)


@pytest.mark.parametrize(("threshold", "why"), [(-1.0, "unset"), (0.0, "too many"), (5.0, "nan")])
def test_where_a_threshold_keeps_too_much_the_librarys_own_code_runs(threshold, why):
    ae = sae("batch", dict_size=20 * 8 * K)
    ae.threshold.fill_(threshold)
    x = activations()
    if why == "nan":
        x[3, 0] = torch.nan
    wanted = ae(x), ae.encode(x)
    with csae.patch("dictionary_learning"):
        found = ae(x), ae.encode(x)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("with_grad", [True, False])
def test_features_beside_the_reconstruction(with_grad):
    ae = sae()
    results = []
    for patched in (False, True):
        undo = csae.patch("dictionary_learning").undo if patched else lambda: None
        with torch.set_grad_enabled(with_grad):
            x_hat, features = ae(activations(), output_features=True)
        assert type(features) is torch.Tensor
        # One who asks for features may want the gradient by them.
        results.append([x_hat, features, *(torch.autograd.grad(x_hat.sum(), features) if with_grad else ())])
        undo()
    for mine, theirs in zip(*reversed(results), strict=True):
        close(mine, theirs)


def test_features_that_are_changed_are_decoded_as_changed():
    ae = sae()
    results = []
    for patched in (False, True):
        undo = csae.patch("dictionary_learning").undo if patched else lambda: None
        with torch.no_grad():
            features, *_ = ae.encode(activations(), return_topk=True)
            features[:, 3] = 2
            results.append(ae.decode(features))
        features, *_ = ae.encode(activations(), return_topk=True)
        features.retain_grad()
        ae.decode(features).square().sum().backward()
        results.append(features.grad)
        undo()
    close(results[2], results[0])
    close(results[3], results[1])


def test_where_few_features_are_positive_outputs_and_gradients_are_the_same():
    ae = sae()
    with torch.no_grad():
        ae.encoder.bias.sub_(3)
    x = activations().requires_grad_()

    def results():
        features, values, _, _ = ae.encode(x, return_topk=True)
        x_hat = ae(x)
        return (
            values.sort(dim=1).values,
            features + 0,
            x_hat,
            *torch.autograd.grad(x_hat.square().sum(), [x, *ae.parameters()]),
        )

    wanted = results()
    with csae.patch("dictionary_learning"):
        found = results()
    assert 0 < (wanted[0] > 0).double().mean() < 0.5  # or this tests nothing
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("layer", ["encoder", "decoder"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_layers_see_dense_tensors(hook, layer):
    ae = sae()
    results = []
    for patched in (False, True):
        undo = csae.patch("dictionary_learning").undo if patched else lambda: None
        seen = []

        def see(module, given, result, seen=seen):
            assert all(type(of) is torch.Tensor for of in (*given, *(result if type(result) is tuple else (result,))))
            seen.append(given[0] + 0)

        handle = getattr(getattr(ae, layer), hook)(see)
        x = activations().requires_grad_()
        ae(x).square().sum().backward()
        handle.remove()
        undo()
        results.append([*seen, x.grad])
        assert seen
    for mine, theirs in zip(*reversed(results), strict=True):
        close(mine, theirs)


def test_a_class_of_a_users_own_keeps_its_encode():
    class Own(top_k.AutoEncoderTopK):
        def encode(self, x):
            return 2 * linear(x, self.encoder.weight)

    ae = Own(D_IN, D_SAE, K).double()
    wanted = ae(activations())
    with csae.patch("dictionary_learning"):
        assert torch.equal(ae(activations()), wanted)


@KINDS
def test_its_evaluation_is_the_same(kind):
    ae = sae(kind)
    ae.threshold.fill_(0.5)
    wanted = evaluate(ae, iter([activations(), activations(4)]), n_batches=2)
    with csae.patch("dictionary_learning"):
        found = evaluate(ae, iter([activations(), activations(4)]), n_batches=2)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_under_autocast_dtypes_are_the_librarys():
    ae = sae().float()
    results = []
    for patched in (False, True):
        undo = csae.patch("dictionary_learning").undo if patched else lambda: None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features, values, _, pre_acts = ae.encode(activations().float(), return_topk=True)
            x_hat = ae.decode(features)
        results.append((x_hat, values, pre_acts + 0, features + 0))
        undo()
    theirs, mine = results
    assert [of.dtype for of in mine] == [of.dtype for of in theirs]
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-2, atol=1e-2)


def test_compiled_it_gives_the_same():
    ae = sae()
    wanted = ae(activations())
    with csae.patch("dictionary_learning"):
        close(torch.compile(ae, backend="aot_eager")(activations()), wanted)


def test_torch_func_gives_the_same():
    ae = sae()
    wanted = torch.func.jacrev(ae)(activations()[0])
    with csae.patch("dictionary_learning"):
        close(torch.func.jacrev(ae)(activations()[0]), wanted)


def test_files_of_it_load_and_k_is_checked(tmp_path):
    ae = sae()
    torch.save(ae.state_dict(), tmp_path / "ae.pt")
    with csae.patch("dictionary_learning"):
        loaded = top_k.AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt").double()
        with pytest.raises(ValueError, match="k=8"):
            top_k.AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt", k=8)
        close(loaded(activations()), ae(activations()))
    close(loaded.state_dict(), ae.float().double().state_dict())


def test_a_k_that_is_annealed_in_place_counts_at_once():
    ae = sae()
    with csae.patch("dictionary_learning"):
        ae.k.fill_(2)
        assert (ae.encode(activations()) != 0).sum(dim=1).max() == 2


# --- the batch's top k -----------------------------------------------------------------------------------------------


def batch_results(ae, x):
    features, active, pre_acts = ae.encode(x, return_active=True, use_threshold=False)
    x_hat = ae.decode(features)
    gradients = torch.autograd.grad(x_hat.square().sum(), ae.parameters())
    return x_hat, features + 0, active, pre_acts + 0, ae.encode(x, use_threshold=False), *gradients


@pytest.mark.parametrize("case", ["usual", "uneven", "one has too many", "few positive", "none positive", "tied"])
def test_the_batchs_top_k_is_exact(case):
    ae, x = sae("batch"), 4 * torch.nn.functional.normalize(activations())
    with torch.no_grad():
        if case == "uneven":
            x[0] *= 1.3
            x[1:9] *= 0.2
        elif case == "one has too many":
            x[0] *= 30
        elif case in ("few positive", "none positive"):
            ae.encoder.bias.sub_({"few positive": 3, "none positive": 100}[case])
        elif case == "tied":
            x[9:18] = x[:9]  # equal values in other tokens: nine of each pair are equal to one in a code
    wanted = batch_results(ae, x)
    with csae.patch("dictionary_learning"):
        found = batch_results(ae, x)
        ours = type(ae.encode(x, return_active=True, use_threshold=False)[0])
    # Where one token may have more than was looked at, the library's own code runs.
    assert ours is (torch.Tensor if case == "one has too many" else Lazy)
    counts = (wanted[1] != 0).sum(dim=1)
    assert case != "uneven" or counts.max() > 2 * K
    assert case != "one has too many" or counts[0] > ROOM * K
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("x", [activations()[:0], activations(3, 2, 5)], ids=["no token", "windows"])
def test_other_shapes_of_a_batch_are_the_librarys_own(x):
    ae = sae("batch")
    wanted = ae.encode(x, use_threshold=False)
    with csae.patch("dictionary_learning"):
        assert torch.equal(ae.encode(x, use_threshold=False), wanted)


def test_a_small_dictionary_is_exact_whatever_comes():
    ae = sae("batch", dict_size=3 * K)
    wanted = batch_results(ae, activations())
    with csae.patch("dictionary_learning"):
        found = batch_results(ae, activations())
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)


def test_undo_gives_all_of_it_back():
    modules = (top_k, batch_top_k, top_k.AutoEncoderTopK, batch_top_k.BatchTopKSAE, batch_top_k.BatchTopKTrainer)
    before = [copy.copy(dict(vars(module))) for module in modules]
    with csae.patch("dictionary_learning"):
        assert [dict(vars(module)) for module in modules] != before
    assert [dict(vars(module)) for module in modules] == before
