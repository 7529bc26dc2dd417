"""Small language models of several families, trained in minutes on the first part of a bundled text.

    python benchmarks/tiny_families.py OUT --family gpt2

Trains on the first 80 % of WikiText-2's validation split, which is 0.9 MB, and writes model and tokenizer to OUT. The
rest of the split is for those who calibrate and measure: `split_text` gives the three parts, which do not overlap. The
tokenizer, byte-level BPE of 1024 tokens, is made of the training part alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from measured import token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_arb.data import bundled_text

CONTEXT_LENGTH = 256
VOCABULARY = 1024
SEQUENCES = 4
WIDTH, LAYERS, HEADS = 256, 4, 4
TRAINING, CALIBRATION = 0.8, 0.1  # fractions of the text; evaluation is the rest
END = "<|end|>"

_WIDE = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT_LENGTH,
}
# Name -> class of the configuration, class of the model, arguments. Of GPT-2 and GPT-NeoX nothing is as in a Llama:
# LayerNorm with biases in place of RMSNorm, one matrix for q, k and v, GELU without a gate, biases everywhere; the one
# has learned positions, transposed weights (`Conv1D`) and a tied output layer, the other attention beside the MLP.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": CONTEXT_LENGTH,
            "embd_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_WIDE, "hidden_dropout": 0.1}),
    "qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {**_WIDE, "num_key_value_heads": HEADS // 2, "head_dim": WIDTH // HEADS, "intermediate_size": 3 * WIDTH},
    ),
}


class Split(NamedTuple):
    """Three parts of a text, in this order and without overlap."""

    training: str
    calibration: str
    evaluation: str


def split_text() -> Split:
    """WikiText-2's validation split in three: 80, 10 and 10 % of its characters, each cut at the next end of a line."""
    text = bundled_text("wikitext-2")
    first = text.index("\n", int(TRAINING * len(text))) + 1
    second = text.index("\n", int((TRAINING + CALIBRATION) * len(text))) + 1
    return Split(text[:first], text[first:second], text[second:])


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a vocabulary made of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT_LENGTH
    )


def untrained(family: str, seed: int) -> PreTrainedModel:
    """A model of a family as transformers initializes it, in float32."""
    config_class, model_class, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=0, **arguments
    )
    return getattr(transformers, model_class)(config)


def train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    steps: int,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    bfloat16: bool = False,
    seed: int = 0,
) -> list[float]:
    """AdamW on windows from random places; the learning rate rises for a tenth of the steps and falls as half a cosine.

    Args:
        model: where it is trained; in place.
        tokens: int64 `[T]`.
        steps: of `SEQUENCES` windows of `CONTEXT_LENGTH` tokens.
        learning_rate: the highest.
        weight_decay: of matrices.
        bfloat16: forward passes under autocast.
        seed: of the places of the windows.

    Returns:
        The loss of every step, in nats a token.
    """
    device = model.device
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    generator = torch.Generator().manual_seed(seed)
    warmup = max(1, steps // 10)
    losses = []
    model.train()
    for step in range(steps):
        part = (step - warmup) / max(1, steps - warmup)
        rate = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        places = torch.randint(len(tokens) - CONTEXT_LENGTH, (SEQUENCES,), generator=generator)
        batch = torch.stack([tokens[place : place + CONTEXT_LENGTH] for place in places.tolist()]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}: loss {sum(losses[-50:]) / 50:.3f}", file=sys.stderr, flush=True)
    model.eval()
    return losses


def trained(out: Path, family: str, steps: int, device: str, bfloat16: bool, seed: int = 0) -> dict[str, Any]:
    """Trains a model and writes it and its tokenizer, and `training.json`, to `out`; does nothing where that is there.

    Returns:
        What `training.json` holds.

    Raises:
        ValueError: `out` holds a model that was trained otherwise.
    """
    wanted = {"family": family, "steps": steps, "seed": seed}
    record = out / "training.json"
    if record.is_file():
        found = json.loads(record.read_text())
        if {key: found[key] for key in wanted} != wanted:
            raise ValueError(f"{out} holds a model of {found}, not of {wanted}: remove it or write elsewhere.")
        return found
    text = split_text().training
    tokenizer = make_tokenizer(text)
    tokens = token_ids(tokenizer, text)
    model = untrained(family, seed).to(device)
    start = time.perf_counter()
    losses = train(model, tokens, steps, bfloat16=bfloat16, seed=seed)
    last = losses[-50:]
    figures = {
        **wanted,
        "parameters": model.num_parameters(),
        "training_tokens": len(tokens),
        "tokens_seen": steps * SEQUENCES * CONTEXT_LENGTH,
        "loss": sum(last) / len(last),
        "seconds": time.perf_counter() - start,
        "device": device,
        "threads": torch.get_num_threads(),
        "bfloat16": bfloat16,
    }
    model.float().cpu().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record.write_text(json.dumps(figures, indent=1))
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small language model on a part of a bundled text.")
    parser.add_argument("out", type=Path, help="directory of the model")
    parser.add_argument("--family", default="gpt2", choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=500, help="of 4 windows of 256 tokens (default: 500)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--bfloat16", action="store_true", help="train under autocast: faster where a CPU has AMX")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(json.dumps(trained(args.out, args.family, args.steps, args.device, args.bfloat16, args.seed), indent=1))


if __name__ == "__main__":
    main()
