"""Divergence of two models: against formulas written out, and against `perplexity`."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model, tokens

from optimum_arb.evaluate import perplexity
from optimum_arb.evaluate.accuracy import _interval, divergence

IDS = tokens(1, 6 * 16)[0]


@pytest.fixture(scope="module")
def pair():
    model, baseline = tiny_model("LlamaForCausalLM", 1), tiny_model("LlamaForCausalLM", 0)
    with torch.no_grad():  # near enough to agree now and then
        for ours, theirs in zip(model.parameters(), baseline.parameters(), strict=True):
            ours.copy_(theirs + 0.3 * (ours - theirs))
    return model, baseline


def test_against_the_formulas(pair):
    model, baseline = pair
    found = divergence(model, baseline, IDS, context_length=16, batch_size=4)
    windows = IDS.view(6, 16)
    with torch.no_grad():
        ours, theirs = (one(windows).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for one in pair)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    assert found.kl_divergence == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_median == pytest.approx(float(kl.sort().values[(len(kl) - 1) // 2]), rel=1e-4)
    assert found.kl_99 == pytest.approx(float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]), rel=1e-4)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(same))
    assert 0 < found.top1_agreement < 1
    assert (found.tokens, found.windows) == (90, 6)
    for one, result in ((model, found.perplexity), (baseline, found.baseline_perplexity)):
        assert result.perplexity == pytest.approx(perplexity(one, IDS, context_length=16).perplexity, rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(found.perplexity.perplexity / found.baseline_perplexity.perplexity)
    low, high = found.ratio_interval
    assert low < found.perplexity_ratio < high


def test_a_model_does_not_diverge_from_itself(pair):
    model, _ = pair
    found = divergence(model, model, IDS, context_length=16, max_windows=5)
    assert (found.kl_divergence, found.top1_agreement, found.perplexity_ratio) == (0.0, 1.0, 1.0)
    assert found.ratio_interval == (1.0, 1.0)
    assert divergence(model, model, IDS, context_length=16, max_windows=2).ratio_interval is None


@pytest.mark.parametrize(("count", "t"), [(4, 3.182446), (6, 2.570582), (31, 2.042272)])
def test_interval_is_students(count, t):
    """With the quantiles of Student's distribution as tables have them."""
    values = torch.arange(count, dtype=torch.float64) / 100
    low, high = (math.log(bound) for bound in _interval(values))
    expected = t * float(values.std()) / math.sqrt(count)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.01)
    assert (high + low) / 2 == pytest.approx(float(values.mean()))


def test_no_more_than_one_batch_of_logits_is_held(pair, monkeypatch):
    """Logits of both models, of one batch each, and nothing that grows with the text."""
    held, most = [], 0
    for one in pair:

        def forward(*args, call=one.forward, **kwargs):
            import weakref

            nonlocal most
            out = call(*args, **kwargs)
            held.append(weakref.ref(out.logits))
            most = max(most, sum(reference() is not None for reference in held))
            return out

        monkeypatch.setattr(one, "forward", forward)
    divergence(*pair, IDS, context_length=16)
    assert len(held) == 12
    assert most <= 2


def test_tokens_that_both_mask_do_not_count(pair):
    class Masked(torch.nn.Module):
        def __init__(self, model, count):
            super().__init__()
            self.model, self.count = model, count

        def forward(self, input_ids):
            found = self.model(input_ids)
            found.logits[..., -self.count :] = -math.inf
            return found

    ids = IDS % 80
    found = divergence(Masked(pair[0], 16), Masked(pair[1], 16), ids, context_length=16)
    with torch.no_grad():
        ours, theirs = (one(ids.view(6, 16)).logits[:, :-1, :80].double().log_softmax(-1) for one in pair)
    assert found.kl_divergence == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)
    # a token that the baseline holds for possible and the model for impossible is another matter
    assert divergence(Masked(pair[0], 16), pair[1], ids, context_length=16).kl_divergence == math.inf


def test_bad_input(pair):
    model, _ = pair
    other = tiny_model("OPTForCausalLM")
    other.resize_token_embeddings(120)
    with pytest.raises(ValueError, match="predicts 96 tokens and the baseline 120"):
        divergence(model, other, IDS, context_length=16)
    with pytest.raises(ValueError, match="fewer than one window"):
        divergence(model, model, IDS[:10], context_length=16)
    broken = tiny_model("LlamaForCausalLM")
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite in window 0"):
        divergence(model, broken, IDS, context_length=16)
