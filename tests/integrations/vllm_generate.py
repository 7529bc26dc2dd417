"""Generates greedily with vLLM in a process of its own: `python vllm_generate.py JOB.json`.

JOB.json holds {"models": [directory, ...], "prompts": [[token id, ...], ...]} and the choices of `DEFAULTS`. For each
model one JSON line follows in JOB.json.out: "tokens" (new tokens of every prompt), "prompt_logprobs" (log probability
of every prompt token but the first), "seconds" and "cpu_seconds" (of this process) of the generation, or "error".
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "max_tokens": 16,
    "dtype": "float32",
    "tensor_parallel": 1,
    "expert_parallel": False,
    "max_model_len": 64,
    "compile": False,
    "lora": None,  # the directory of an adapter
    "timed": False,  # generate twice, without log probabilities, and take the time of the second
}
ALWAYS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def generate(model: str, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model,
        dtype=job["dtype"],
        tensor_parallel_size=job["tensor_parallel"],
        enable_expert_parallel=job["expert_parallel"],
        max_model_len=job["max_model_len"],
        max_num_seqs=max(2, len(job["prompts"])),
        enforce_eager=not job["compile"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enable_lora=job["lora"] is not None,
        disable_log_stats=True,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        # with an adapter, vLLM 0.32 on a CPU fails at them, packed or not
        prompt_logprobs=None if job["timed"] or job["lora"] else 1,
    )
    adapter = LoRARequest("adapter", 1, job["lora"]) if job["lora"] else None
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    if job["timed"]:
        llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
    start, cpu_start = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompt_logprobs": [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
            for output, prompt in zip(outputs, job["prompts"], strict=True)
            if output.prompt_logprobs is not None
        ],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def main(path: Path) -> None:
    job = {**DEFAULTS, **json.loads(path.read_text())}
    ranks = job["tensor_parallel"]
    os.environ.update(ALWAYS)
    os.environ.update(ONE_PROCESS if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))})
    from vllm.distributed import cleanup_dist_env_and_memory

    with open(f"{path}.out", "w") as out:
        for model in job["models"]:
            try:
                result = generate(model, job)
            except Exception as error:  # what a test expects to be refused
                result = {"error": f"{type(error).__name__}: {error}"}
            gc.collect()
            cleanup_dist_env_and_memory()
            print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
