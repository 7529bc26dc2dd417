"""A decoding step with a static cache as torch compiles it: one graph, and the same one for every token."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny, tokens
from transformers import AutoModelForCausalLM, StaticCache

from optimum_arb import ARBConfig

PROMPT, NEW = 6, 8
CALIBRATED = {"dataset": tokens(), "num_samples": 4}
CHOICES = {
    "two planes": {"planes": 2},
    "columns permuted": {"admm_iterations": 0, **CALIBRATED},
    "Hadamard and codes": {"hadamard": 64, "scale_bits": 8, **CALIBRATED},
    "factors": {"method": "arb-dbf", "factor_bits": 1.5},
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Code that was compiled too often for other layers is not compiled again, here and in the tests that follow."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@torch.no_grad()
def test_steps_are_one_graph_and_compiled_once(tmp_path, choices):
    """`fullgraph` refuses a break, `error_on_recompile` a second graph."""
    source = save_tiny(tmp_path, "LlamaForCausalLM")
    config = ARBConfig(**{"dataset": None, "block_size": 64, **choices})
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    ids = tokens(1, PROMPT)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, PROMPT:].tolist()

    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    found = [int(logits.argmax(-1))]
    for position in range(PROMPT, PROMPT + NEW - 1):
        place = {"cache_position": torch.tensor([position]), "position_ids": torch.tensor([[position]])}
        with torch._dynamo.config.patch(error_on_recompile=position > PROMPT):
            logits = step(torch.tensor([found[-1:]]), past_key_values=cache, **place).logits
        found.append(int(logits.argmax(-1)))
    assert found == expected
