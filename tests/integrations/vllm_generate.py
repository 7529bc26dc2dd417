"""Generates greedily with vLLM in a process of its own: `python vllm_generate.py MODEL OUT.json [--options]`.

Writes {"tokens": [[...]], "prompt_logprobs": [[...]], "seconds": float}: the new tokens of every prompt, the log
probability of every prompt token but the first, and the time that the generation took.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
ALWAYS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=json.loads, required=True, help="lists of token ids, as JSON")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--time", action="store_true", help="generate twice and time the second one")
    args = parser.parse_args()
    ranks = args.tensor_parallel
    os.environ.update(ALWAYS)
    os.environ.update(ONE_PROCESS if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))})

    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        dtype=args.dtype,
        tensor_parallel_size=ranks,
        max_model_len=args.max_model_len,
        max_num_seqs=max(2, len(args.prompts)),
        enforce_eager=not args.compile,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=args.max_tokens,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=None if args.time else 1,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in args.prompts]
    if args.time:
        llm.generate(prompts, sampling, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompt_logprobs": [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
            for output, prompt in zip(outputs, args.prompts, strict=True)
            if output.prompt_logprobs is not None
        ],
        "seconds": seconds,
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
