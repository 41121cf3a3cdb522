"""SAEBench's interface for custom SAEs, and its core evaluation on a tiny model and local text."""

import json
import logging

import pytest
import torch
from interop_saes import D_IN, D_SAE, activations, contextual, dense, dense_windows, needs, topk, with_thresholds

from csae.data.activations import sink_mask
from csae.interop.sae_bench import SAEBenchSAE
from csae.trained_on import TrainedOn

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SAES = {
    "topk": lambda: topk(1.7),
    "current": lambda: contextual("current", 1.7),
    "past": lambda: contextual("past", 1.7),
    "batch": lambda: with_thresholds("batch", 1.7),
    "jumprelu": lambda: with_thresholds("jumprelu", 1.7),
}
PER_TOKEN = ("topk", "batch", "jumprelu")


@pytest.mark.parametrize("kind", SAES)
def test_encode_and_decode_are_those_of_the_sae_in_dense_form(kind):
    sae, windows = SAES[kind](), activations(2, 9)
    theirs = SAEBenchSAE(sae, "m", hook_layer=3)
    feature_acts, x_hat = theirs.encode(windows), theirs(windows)
    assert feature_acts.shape == (2, 9, D_SAE)
    if kind in PER_TOKEN:
        wanted, wanted_x_hat = dense(sae, windows), sae(windows).x_hat
        pre = (windows - theirs.b_dec) @ theirs.W_enc + theirs.b_enc
        if kind != "jumprelu":  # there the largest may be below its own threshold
            torch.testing.assert_close(feature_acts.max(dim=-1).values, pre.max(dim=-1).values, **CLOSE)
        torch.testing.assert_close(theirs.encode(windows[0]), feature_acts[0])
    else:
        wanted, wanted_x_hat = dense_windows(sae, windows)
    torch.testing.assert_close(feature_acts, wanted, **CLOSE)
    torch.testing.assert_close(x_hat, wanted_x_hat, **CLOSE)
    assert torch.equal(theirs.decode(feature_acts), x_hat)
    assert sae.scale == torch.tensor(1.7)


@pytest.mark.parametrize("kind", SAES)
def test_the_weights_and_the_config_are_as_sae_bench_reads_them(kind):
    theirs = SAEBenchSAE(SAES[kind](), "m", hook_layer=3, context_size=64)
    assert (theirs.W_enc.shape, theirs.b_enc.shape) == ((D_IN, D_SAE), (D_SAE,))
    assert (theirs.W_dec.shape, theirs.b_dec.shape) == ((D_SAE, D_IN), (D_IN,))
    assert isinstance(theirs.W_dec, torch.nn.Parameter)
    torch.testing.assert_close(theirs.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert (theirs.device, theirs.dtype) == (torch.device("cpu"), torch.float32)
    assert theirs.cfg.hook_name == "blocks.3.hook_resid_post"
    assert json.loads(json.dumps(theirs.cfg.to_dict()))["context_size"] == 64
    assert theirs.to(device="cpu", dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="hook_layer: given -1; needed 0 or more"):
        SAEBenchSAE(SAES[kind](), "m", hook_layer=-1)


def test_a_contextual_sae_refuses_what_are_no_windows():
    theirs = SAEBenchSAE(contextual(), "m", hook_layer=3)
    with pytest.raises(ValueError, match=r"given shape \[9, 7\]; needed whole windows \[B, T, d_in\]"):
        theirs.encode(activations(9))


def test_padding_with_zeros_changes_no_code_and_is_not_looked_at():
    theirs, windows = SAEBenchSAE(contextual(), "m", hook_layer=3), activations(2, 9)
    padded = torch.cat([windows, torch.zeros(2, 12, D_IN)], dim=1)  # more padding than text
    found, wanted = theirs.encode(padded)[:, :9], theirs.encode(windows)
    assert torch.equal(found[:, 1:], wanted[:, 1:])
    # Position 0 is encoded with all that the mask leaves out: more rows of a product may be summed in another order.
    torch.testing.assert_close(found[:, 0], wanted[:, 0], **CLOSE)
    padded[1, 4] = 0
    assert sink_mask(padded)[1].tolist() == [False, True, True, True, False, *[True] * 4, *[False] * 12]
    assert theirs.encode(torch.zeros(2, 9, D_IN)).shape == (2, 9, D_SAE)


@pytest.mark.parametrize("bos", [False, True])
def test_position_0_takes_part_where_it_did_in_training(bos):
    sae, windows = contextual(), activations(2, 9)
    windows[:, 5] *= 1000
    sae.trained_on = TrainedOn(keep_first=True, bos=bos)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 0] = not bos
    theirs = SAEBenchSAE(sae, "m", hook_layer=3)
    torch.testing.assert_close(theirs(windows)[mask], sae(windows, mask).x_hat[mask], **CLOSE)


def test_windows_are_decoded_with_what_was_carried_there():
    theirs, first, second = SAEBenchSAE(contextual(), "m", hook_layer=3), activations(2, 9), activations(2, 9) + 1
    wanted = theirs(first)
    acts = theirs.encode(first)
    other = theirs.encode(second)
    torch.testing.assert_close(theirs.decode(acts), wanted)
    torch.testing.assert_close(theirs.decode(other.clone()), theirs(second))


@needs("sae_bench")
@pytest.mark.filterwarnings("ignore")
def test_core_evaluation_gives_what_we_measure_ourselves(tmp_path, monkeypatch, caplog):
    from sae_bench.evals.core import main as core
    from tiny_model import PROSE, make_tokenizer
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    sizes = {"n_layers": 2, "d_model": D_IN, "n_ctx": 16, "d_head": 4, "n_heads": 2, "d_vocab": 300, "seed": 0}
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, bos_token="<|endoftext|>")
    model = HookedTransformer(HookedTransformerConfig(**sizes, act_fn="relu"), tokenizer=tokenizer)
    monkeypatch.setattr(core.HookedTransformer, "from_pretrained_no_processing", lambda *args, **options: model)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text((json.dumps({"text": PROSE * 3}) + "\n") * 4)

    saes = [(kind, SAEBenchSAE(make(), kind, hook_layer=0)) for kind, make in SAES.items()]
    seen = record(saes, monkeypatch)
    with caplog.at_level(logging.ERROR, logger=core.logger.name):
        results = core.multiple_evals(
            saes,
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
            eval_batch_size_prompts=4,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(tmp_path / "text"),
            context_size=16,
            output_folder=str(tmp_path / "results"),
            device="cpu",
        )
    assert [record.message for record in caplog.records if record.name == core.logger.name] == []
    assert [result["sae_set"] for result in results] == list(SAES)
    for (kind, _), result in zip(saes, results, strict=True):
        x, sae = seen[kind], SAES[kind]()
        feature_acts, x_hat = (dense(sae, x), sae(x).x_hat) if kind in PER_TOKEN else dense_windows(sae, x)
        x, x_hat = x[:, 1:].reshape(-1, D_IN), x_hat[:, 1:].reshape(-1, D_IN)  # position 0 is a special token
        quality, sparsity = result["metrics"]["reconstruction_quality"], result["metrics"]["sparsity"]
        unexplained = (x - x_hat).square().sum(dim=1) / (x - x.mean(dim=0)).square().sum(dim=1)
        assert quality["explained_variance_legacy"] == pytest.approx(1 - unexplained.mean().item(), rel=1e-4)
        assert sparsity["l0"] == pytest.approx((feature_acts[:, 1:] > 0).sum(dim=-1).float().mean().item())
        assert (tmp_path / "results" / f"{kind}_custom_sae_eval_results.json").is_file()


def record(saes, monkeypatch):
    """kind -> the windows of activations that its SAE encoded last."""
    seen = {}
    for kind, sae in saes:

        def encode(acts, kind=kind, original=sae.encode):
            seen[kind] = acts
            return original(acts)

        monkeypatch.setattr(sae, "encode", encode)
    return seen
