"""Both SAEs: against the reference, their loss, dead features, saving, compilation."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from csae import Code, ContextualSAE, TopKSAE, reference
from csae.checkpoint import load_sae
from csae.errors import UserError
from csae.factors import Factors
from csae.sae import Sweeps


def contextual(dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"n_heads": 2, "d_head": 3, "d_value": 4, "d_memory": 7, "dead_after": 20} | options
    sae = ContextualSAE(6, 15, 3, **options)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec, sae.gain, sae.slope, sae.null, sae.W_O):
            parameter += 0.3 * torch.randn_like(parameter)
    sae.initialise(torch.randn(6), 1.7)
    return sae.to(dtype)


def topk(dtype=torch.float64):
    torch.manual_seed(0)
    sae = TopKSAE(6, 15, 3, dead_after=20)
    sae.initialise(torch.randn(6), 1.7)
    return sae.to(dtype)


def windows(dtype=torch.float64, B=2, T=9):
    generator = torch.Generator().manual_seed(3)
    acts = 2 * torch.randn(B, T, 6, generator=generator).to(dtype)
    mask = torch.rand(B, T, generator=generator) > 0.2
    documents = torch.randint(0, 2, (B, T), generator=generator).sort(dim=1).values
    return acts, mask, documents


def weights(sae):
    return reference.ContextualWeights(*(getattr(sae, name) for name in reference.ContextualWeights._fields))


def test_topk_sae_matches_the_reference():
    sae, (acts, mask, documents) = topk(), windows()
    out = sae(acts, mask, documents)
    wanted = reference.topk_sae(acts / sae.scale, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, 3)
    torch.testing.assert_close(out.x_hat, wanted.x_hat * sae.scale)
    assert torch.equal(out.code.indices, wanted.indices)
    assert torch.equal(sae.decode(sae.encode(acts)), out.x_hat)
    assert out.c.abs().max() == 0


@pytest.mark.parametrize("bounds", [False, True], ids=["open", "mask+documents"])
@pytest.mark.parametrize("sweeps", [0, 1, 2, 9])
@pytest.mark.parametrize("k_mem", [None, 2], ids=["all remembered", "two remembered"])
@pytest.mark.parametrize("query", ["current", "past"])
def test_contextual_sweeps_match_the_reference_with_every_gradient(query, k_mem, sweeps, bounds):
    sae, (acts, mask, documents) = contextual(query=query, sweeps=sweeps, k_mem=k_mem), windows()
    where = (mask, documents) if bounds else (None, None)
    out = sae(acts, *where, exact=False)
    wanted = reference.contextual_sweeps(acts / sae.scale, weights(sae), 3, query, sweeps, *where, k_mem=k_mem)
    torch.testing.assert_close(out.x_hat, wanted.x_hat * sae.scale)
    torch.testing.assert_close(out.c, wanted.c * sae.scale)
    torch.testing.assert_close(out.code.values, wanted.values)
    parameters = dict(sae.named_parameters())
    grad = torch.randn_like(acts)
    found = torch.autograd.grad(out.x_hat / sae.scale, parameters.values(), grad, allow_unused=True)
    expected = torch.autograd.grad(wanted.x_hat, parameters.values(), grad, allow_unused=True)
    for name, got, want in zip(parameters, found, expected, strict=True):
        if want is None:
            assert sweeps == 0
            assert got is None
        else:
            torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("bounds", [False, True], ids=["open", "mask+documents"])
@pytest.mark.parametrize("sweeps", [0, 1, 2])
@pytest.mark.parametrize("query", ["current", "past"])
def test_sweeps_from_the_exact_codes_give_them_again_with_a_gradient(query, sweeps, bounds):
    sae, (acts, mask, documents) = contextual(query=query, sweeps=sweeps), windows()
    where = (mask, documents) if bounds else (None, None)
    exact = sae(acts, *where, exact=True)
    out = sae(acts, *where, exact=False, sweeps=Sweeps(sweeps, from_exact=True))
    for got, want in ((out.x_hat, exact.x_hat), (out.c, exact.c), (out.code.values, exact.code.values)):
        torch.testing.assert_close(got, want)
    x = acts / sae.scale
    start = reference.contextual_exact(x, weights(sae), 3, query, *where)
    start = start._replace(c=start.c.detach(), suppressed=start.suppressed.detach())
    wanted = reference.contextual_sweeps(x, weights(sae), 3, query, sweeps, *where, start=start)
    parameters = dict(sae.named_parameters())
    grad = torch.randn_like(acts)
    found = torch.autograd.grad(out.x_hat / sae.scale, parameters.values(), grad, allow_unused=True)
    expected = torch.autograd.grad(wanted.x_hat, parameters.values(), grad, allow_unused=True)
    for name, got, want in zip(parameters, found, expected, strict=True):
        assert (got is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def test_given_sweeps_are_run_in_any_mode_and_never_beside_exact():
    sae, (acts, *_) = contextual(sweeps=1).eval(), windows()
    assert torch.equal(sae(acts, sweeps=Sweeps(1)).x_hat, sae(acts, exact=False).x_hat)
    with pytest.raises(ValueError, match="exact, sweeps: both given"):
        sae(acts, exact=True, sweeps=Sweeps(1))


@pytest.mark.parametrize("bounds", [False, True], ids=["open", "mask+documents"])
@pytest.mark.parametrize("query", ["current", "past"])
def test_contextual_exact_matches_the_reference(query, bounds):
    sae, (acts, mask, documents) = contextual(query=query), windows()
    where = (mask, documents) if bounds else (None, None)
    out = sae.eval()(acts, *where)
    wanted = reference.contextual_exact(acts / sae.scale, weights(sae), 3, query, *where)
    torch.testing.assert_close(out.x_hat, wanted.x_hat * sae.scale)
    torch.testing.assert_close(out.c, wanted.c * sae.scale)
    torch.testing.assert_close(out.code.values, wanted.values)
    assert torch.equal(sae.train()(acts, *where).x_hat, sae(acts, *where, exact=False).x_hat)


def test_strict_form_is_rebuilt_from_its_codes_alone():
    sae, (acts, mask, documents) = contextual(query="past").eval(), windows()
    out = sae(acts, mask, documents)
    torch.testing.assert_close(sae.decode(out.code, mask=mask, documents=documents), out.x_hat)


def test_current_form_is_rebuilt_from_codes_and_c():
    sae, (acts, mask, documents) = contextual().eval(), windows()
    out = sae(acts, mask, documents)
    torch.testing.assert_close(sae.decode(out.code, out.c), out.x_hat)
    with pytest.raises(ValueError, match=r"c: not given; needed with query=\"current\""):
        sae.decode(out.code)


def test_masked_positions_get_an_empty_code_and_do_not_matter():
    sae, (acts, mask, documents) = contextual(), windows()
    mask[:, 4] = False
    before = sae(acts, mask, documents, exact=False)
    assert before.code.values[~mask].abs().max() == 0
    changed = torch.where(mask[..., None], acts, 1e6)
    after = sae(changed, mask, documents, exact=False)
    assert torch.equal(before.x_hat, after.x_hat)
    assert torch.equal(sae.loss(acts, mask, documents).fvu, sae.loss(changed, mask, documents).fvu)


@pytest.mark.parametrize("sae", [topk(), contextual()], ids=["topk", "contextual"])
def test_loss_is_the_fraction_of_variance_unexplained_over_the_mask(sae):
    acts, mask, documents = windows()
    losses = sae.loss(acts, mask, documents)
    x_hat = sae.train()(acts, mask, documents).x_hat
    error = (acts - x_hat)[mask].square().sum()
    spread = (acts - acts[mask].mean(dim=0))[mask].square().sum()
    torch.testing.assert_close(losses.fvu, error / spread)
    assert losses.aux == 0
    assert torch.equal(losses.loss, losses.fvu)


def test_aux_is_the_residual_left_by_the_most_active_dead_features():
    sae, (acts, mask, documents) = topk(), windows()
    dead = torch.tensor([2, 5, 6, 11])
    losses = sae.loss(acts, mask, documents, dead)
    x = acts / sae.scale
    residual = x - sae(acts).x_hat / sae.scale
    pre_acts = (x - sae.b_dec) @ sae.W_enc[dead].T + sae.b_enc[dead]
    best = pre_acts.topk(3)  # k_aux = d_in // 2 = 3
    residual_hat = (best.values.relu().unsqueeze(-1) * sae.W_dec[dead][best.indices]).sum(dim=-2)
    wanted = (residual - residual_hat)[mask].square().sum() / residual[mask].square().sum()
    torch.testing.assert_close(losses.aux, wanted)
    torch.testing.assert_close(losses.loss, losses.fvu + sae.aux_coef * wanted)
    # Only dead features are pulled by it, and nothing flows into the residual that it explains.
    grads = torch.autograd.grad(losses.aux, (sae.W_enc, sae.W_dec))
    alive = [f for f in range(15) if f not in dead]
    for grad in (grad.to_dense() for grad in grads):
        assert grad[alive].abs().max() == 0
        assert grad[dead].abs().max() > 0


def test_dead_features_are_those_that_did_not_fire_for_long_enough():
    sae = topk()
    code = Code(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[0, 1], [2, 3]]))
    sae.track(code)
    assert sae.tokens_since_fired[:5].tolist() == [0, 2, 0, 0, 2]
    sae.track(code, torch.tensor([True, False]))
    assert sae.tokens_since_fired[:5].tolist() == [0, 3, 1, 1, 3]
    sae.tokens_since_fired[7] = 20
    assert sae.dead_features().tolist() == [7]


def test_decoder_rows_start_and_stay_at_unit_norm():
    sae = topk()
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.float().norm(dim=1), torch.ones(15))
    sae.normalise_decoder()  # the rows were made in float32
    sae.loss(*windows()).loss.backward()
    sae.remove_parallel_gradient()
    assert (sae.W_dec.grad * sae.W_dec).sum(dim=1).abs().max() < 1e-12
    with torch.no_grad():
        sae.W_dec -= 0.1 * sae.W_dec.grad
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(15, dtype=torch.float64))


def test_initialise_takes_mean_and_scale():
    sae, mean = TopKSAE(6, 15, 3), torch.arange(6.0)
    sae.initialise(mean, 2.0)
    torch.testing.assert_close(sae.b_dec * sae.scale, mean)
    for bad in (0.0, float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="scale: given"):
            sae.initialise(mean, bad)
    with pytest.raises(ValueError, match=r"mean: given shape \[5\]; needed \[d_in\] = \[6\]"):
        sae.initialise(mean[:5], 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [topk, contextual, lambda d: contextual(d, query="past")], ids=["topk", "current", "past"]
)
def test_a_compiled_training_step_agrees_with_eager(make):
    sae, (acts, mask, documents) = make(torch.float32), windows(torch.float32)
    dead = torch.tensor([1, 4, 9])
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)

    def after(code):
        sae.normalise_decoder()
        sae.track(code, mask)

    def step(loss, before, after):
        optimizer.zero_grad()
        losses = loss(acts, mask, documents, dead)
        losses.loss.backward()
        before()
        optimizer.step()  # torch itself breaks the graph there
        after(losses.code)
        return losses.loss.detach()

    parts = (sae.loss, sae.remove_parallel_gradient, after)
    start = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    wanted = [step(*parts) for _ in range(3)]
    eager = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.load_state_dict(start)
    optimizer.state.clear()
    compiled = [torch.compile(part, fullgraph=True) for part in parts]
    found = [step(*compiled) for _ in range(3)]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted))
    for name, tensor in sae.state_dict().items():
        torch.testing.assert_close(tensor, eager[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "sae", [topk(torch.float32), contextual(torch.float32, query="past")], ids=["topk", "contextual"]
)
def test_saved_and_loaded_it_is_the_same(sae, tmp_path):
    sae.track(sae.loss(*windows(torch.float32)).code)
    sae.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    for loaded in (type(sae).from_pretrained(tmp_path / "saved"), load_sae(tmp_path / "saved")):
        assert type(loaded) is type(sae)
        assert loaded.state_dict().keys() == sae.state_dict().keys()
        for name, tensor in sae.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        acts, mask, documents = windows(torch.float32)
        assert torch.equal(loaded.eval()(acts, mask, documents).x_hat, sae.eval()(acts, mask, documents).x_hat)


def test_a_hub_id_works_as_a_folder_does(tmp_path, monkeypatch):
    sae = contextual(torch.float32)
    sae.save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    for module in ("csae.saving", "csae.checkpoint", "huggingface_hub.hub_mixin"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    for loaded in (ContextualSAE.from_pretrained("someone/some-sae"), load_sae("someone/some-sae")):
        for name, tensor in sae.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    assert set(asked) == {("someone/some-sae", "config.json"), ("someone/some-sae", "model.safetensors")}


def damaged(folder, damage):
    if damage == "truncated":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "foreign tensors":
        save_file({"decoder": torch.zeros(2)}, folder / "model.safetensors")
    elif damage == "other shapes":
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {"W_dec": torch.zeros(2, 2)}, folder / "model.safetensors")
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "foreign config":
        (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    elif damage == "broken config":
        (folder / "config.json").write_text('{"arch": "topk", ')
    elif damage == "list config":
        (folder / "config.json").write_text("[]")
    elif damage.startswith("impossible config"):
        if damage.endswith("of an earlier version"):
            save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"k": 99}))
    elif damage == "missing size":
        (folder / "config.json").write_text('{"arch": "topk", "d_in": 6, "k": 3}')
    elif damage == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "not a whole safetensors file"),
        ("foreign tensors", "not a saved TopKSAE"),
        ("other shapes", "not a saved TopKSAE"),
        ("no weights", "model.safetensors"),
        ("foreign config", "not an SAE of csae: arch is None"),
        ("broken config", "not JSON"),
        ("list config", "needed an object"),
        ("impossible config", "not as model.safetensors says: k is 99, not 3"),
        ("impossible config of an earlier version", "k: given 99; needed 1 <= k <= d_sae = 15"),
        ("missing size", "d_sae"),
        ("no config", "no saved SAE here"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_in_one_line(damage, message, tmp_path):
    topk(torch.float32).save_pretrained(tmp_path)
    damaged(tmp_path, damage)
    with pytest.raises(UserError) as error:
        load_sae(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_nothing_is_unpickled(tmp_path):
    topk(torch.float32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"W_dec": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model.safetensors"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: TopKSAE(0, 5, 1), ValueError, "d_in: given 0; needed at least 1"),
        (lambda: TopKSAE(4, 5.0, 1), TypeError, "d_sae: given 5.0; needed a whole number"),
        (lambda: TopKSAE(4, 5, 1, dead_after=0), ValueError, "dead_after: given 0; needed at least 1"),
        (lambda: TopKSAE(4, 5, 1, k_aux="3"), TypeError, "k_aux: given '3'; needed a whole number"),
        (lambda: TopKSAE(4, 5, 1, aux_coef=float("nan")), ValueError, "aux_coef: given nan; needed a number of zero"),
        (lambda: TopKSAE(4, 5, 1, aux_coef="1"), TypeError, "aux_coef: given '1'; needed a number"),
        (lambda: TopKSAE(4, 5, 6), ValueError, "k: given 6; needed 1 <= k <= d_sae = 5"),
        (
            lambda: ContextualSAE(4, 5, 2, query="both"),
            ValueError,
            "query: given 'both'; needed one of 'current', 'past'",
        ),
        (lambda: ContextualSAE(4, 5, 2, n_heads=0), ValueError, "n_heads: given 0; needed at least 1"),
        (lambda: ContextualSAE(4, 5, 2, sweeps=-1), ValueError, "sweeps: given -1; needed 0 or more"),
        (lambda: topk()(torch.zeros(2, 5)), ValueError, "acts: given shape [2, 5]; needed [..., d_in] with d_in = 6"),
        (lambda: topk()([1.0]), TypeError, "acts: given a list; needed a torch.Tensor"),
        (lambda: topk()(torch.zeros(2, 6).long()), TypeError, "acts: given dtype torch.int64; needed a floating dtype"),
        (
            lambda: topk().loss(torch.zeros(2, 9, 6), torch.ones(9).bool()),
            ValueError,
            "mask: given shape [9]; needed one entry a position, [2, 9]",
        ),
        (
            lambda: contextual()(torch.zeros(2, 9, 6), documents=torch.ones(2, 8).int()),
            ValueError,
            "documents: given shape [2, 8]; needed one entry a position, [2, 9]",
        ),
        (
            lambda: topk().loss(torch.zeros(2, 9, 6), torch.ones(2, 9)),
            TypeError,
            "mask: given dtype torch.float32; needed torch.bool",
        ),
        (lambda: contextual()(torch.zeros(2, 6)), ValueError, "acts: given shape [2, 6]; needed windows [B, T, d_in]"),
        (
            lambda: topk()(torch.zeros(2, 6).to(torch.float8_e5m2)),
            TypeError,
            "acts: given dtype torch.float8_e5m2; needed",
        ),
        (
            lambda: topk()(torch.zeros(2, 6, device="meta")),
            ValueError,
            "acts: given on meta; needed on cpu as the SAE is",
        ),
        (
            lambda: contextual()(torch.zeros(2, 9, 6), torch.ones(2, 9, device="meta").bool(), exact=True),
            ValueError,
            "mask: given on meta; needed on cpu as acts is",
        ),
        (
            lambda: contextual().step(torch.zeros(2, 6), contextual().initial_state(2), [True, True]),
            TypeError,
            "mask: given a list; needed a torch.Tensor",
        ),
        (
            lambda: topk().track(topk().encode(torch.zeros(2, 9, 6)), torch.ones(9).bool()),
            ValueError,
            "mask: given shape [9]; needed one entry a position, [2, 9]",
        ),
        (
            lambda: topk().track(topk().encode(torch.zeros(2, 6)), torch.full((2,), 2)),
            TypeError,
            "mask: given dtype torch.int64; needed torch.bool",
        ),
        (
            lambda: contextual().decode(contextual().encode(torch.zeros(2, 9, 6)), torch.zeros(2, 9, 6).cfloat()),
            TypeError,
            "c: given dtype torch.complex64; needed a floating dtype",
        ),
    ],
)
def test_errors_name_the_argument(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("query", ["current", "past"])
@pytest.mark.parametrize("windows_kept", [1, 2, 5])
def test_narrow_sweeps_are_the_same_sweeps(query, windows_kept, monkeypatch):
    """A wide SAE with a narrow look-back keeps its pre-activations; the code and all gradients are as without."""
    from csae import contextual_sae, selection
    from csae.factors import Factors

    torch.manual_seed(0)
    sae = ContextualSAE(64, 50, 4, n_heads=2, d_head=3, d_value=5, query=query, sweeps=2)
    with torch.no_grad():
        sae.W_O.mul_(5)
    acts, mask = torch.randn(5, 9, 64), torch.rand(5, 9) > 0.2
    documents = torch.tensor([0] * 4 + [1] * 5).expand(5, 9)
    kept = []
    keep = selection.encode_and_keep
    monkeypatch.setattr(contextual_sae, "KEPT_BYTES", windows_kept * 4 * 9 * 50)
    monkeypatch.setattr(selection, "encode_and_keep", lambda *given: kept.append(given) or keep(*given))

    def run():
        sae.zero_grad()
        sae.loss(acts, mask, documents).loss.backward()
        plain = {name: parameter.grad for name, parameter in sae.named_parameters() if parameter.grad is not None}
        losses, gradients = sae.gradients(acts, mask, documents)
        dense = {
            name: (of.dense() if isinstance(of, Factors) else of).view(getattr(sae, name).shape)
            for name, of in gradients.items()
        }
        return losses, plain, dense

    narrow = run()
    assert len(kept) == 2 * -(-5 // windows_kept)
    monkeypatch.setattr(contextual_sae, "NARROW", 1000)
    wide = run()
    assert len(kept) == 2 * -(-5 // windows_kept)
    torch.testing.assert_close(narrow[0].fvu, wide[0].fvu)
    assert torch.equal(narrow[0].code.indices, wide[0].code.indices)
    for way in (1, 2):
        assert narrow[way].keys() == wide[way].keys() >= {"W_enc", "W_mem", "W_O", "b_dec"}
        for name, gradient in wide[way].items():
            torch.testing.assert_close(narrow[way][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("query", ["current", "past"])
def test_a_model_in_another_dtype(query, dtype):
    torch.manual_seed(0)
    sae = ContextualSAE(24, 96, 4, n_heads=2, query=query)
    acts = torch.randn(2, 12, 24).to(dtype)
    wanted = {exact: sae(acts.float(), exact=exact).x_hat for exact in (False, True)}
    sae = sae.to(dtype)
    for exact, x_hat in wanted.items():
        found = sae(acts, exact=exact)
        assert found.x_hat.dtype == found.code.values.dtype == found.c.dtype == dtype
        # In half precision another feature may be chosen here and there.
        assert (found.x_hat - x_hat).norm() < 0.1 * x_hat.norm()
    losses, gradients = sae.gradients(acts)
    sae.loss(acts).loss.backward()
    assert losses.loss.isfinite()
    for name, parameter in sae.named_parameters():
        gradient = gradients[name]
        gradient = gradient if isinstance(gradient, torch.Tensor) else gradient.dense().view(parameter.shape)
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype
        assert (gradient - parameter.grad).norm() <= 0.05 * parameter.grad.norm()


@pytest.mark.parametrize("method", ["loss", "gradients"])
@pytest.mark.parametrize(
    ("dead", "kind", "words"),
    [
        (torch.arange(23) > 3, TypeError, "dead: given dtype torch.bool"),
        (torch.tensor([1, -5]), ValueError, "dead: given -5 to 1; needed 0 <= feature < d_sae"),
        (torch.tensor([1, 10**6]), ValueError, "dead: given 1 to 1000000; needed 0 <= feature < d_sae"),
        (torch.tensor([1.0]), TypeError, "dead: given dtype torch.float32"),
        (torch.tensor([[1, 2], [3, 4]]), TypeError, r"dead: given dtype torch.int64, shape \[2, 2\]"),
        ([1, 2], TypeError, "dead: given a list"),
    ],
    ids=["mask", "negative", "too large", "float", "matrix", "list"],
)
def test_dead_features_are_numbers_of_features(dead, kind, words, method):
    with pytest.raises(kind, match=words):
        getattr(topk(), method)(torch.randn(2, 9, 6), dead=dead)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("sae", [topk, contextual, lambda: contextual(query="past")], ids=["topk", "current", "past"])
def test_what_the_mask_leaves_out_of_a_loss_may_be_anything(sae, number):
    """As an attention sink is, that is too large for float16."""
    sae, acts, mask = sae(), torch.randn(2, 9, 6, dtype=torch.float64), torch.rand(2, 9) > 0.3
    mask[0, 2] = False
    wild = acts.masked_fill(~mask.unsqueeze(-1), number)
    dead = torch.tensor([1, 3])
    wanted, found = sae.gradients(acts, mask, None, dead), sae.gradients(wild, mask, None, dead)
    for got, want in zip(found[0][:3], wanted[0][:3], strict=True):
        assert torch.equal(got, want)
    for name, of in wanted[1].items():
        right, got = (g.dense() if isinstance(g, Factors) else g for g in (of, found[1][name]))
        torch.testing.assert_close(got, right, msg=name)
    sae.loss(wild, mask, None, dead).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


@pytest.mark.parametrize("query", ["current", "past"])
def test_windows_of_no_positions(query):
    out = contextual(query=query)(torch.zeros(2, 0, 6), exact=False)
    assert out.x_hat.shape == (2, 0, 6)


def test_a_code_may_be_a_plain_tuple():
    sae = contextual(query="past")
    out = sae(torch.randn(2, 9, 6), exact=True)
    torch.testing.assert_close(sae.decode(tuple(out.code), mask=None, documents=None), out.x_hat.double())
