"""Uploads a binarized model to a Hub on your own machine or network, and loads it from there.

    python examples/push_to_local_hub.py MODEL --endpoint http://hub.internal:8080 --repo me/model
    python examples/push_to_local_hub.py MODEL

MODEL is a directory that `optimum-arb quantize` or `save_model` wrote. Without an endpoint the example starts the small
server that this repository's tests use (tests/hub/loopback.py), which lives as long as the example does and holds
everything in memory: it shows the way of a model without an account. With an endpoint, the token is HF_TOKEN's.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description="Push a binarized model to a local Hub and load it from there.")
    parser.add_argument("model", metavar="MODEL", type=Path, help="directory of a binarized model")
    parser.add_argument("--endpoint", help="of the Hub (default: one that this example starts)")
    parser.add_argument("--repo", default="me/binarized", help="repository (default: me/binarized)")
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args()
    with ExitStack() as stack:
        if args.endpoint:
            os.environ["HF_ENDPOINT"] = args.endpoint
        else:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hub"))
            from loopback import serve

            os.environ["HF_ENDPOINT"] = stack.enter_context(serve()).url
            os.environ["HF_TOKEN"] = "hf_writer"  # the server's own account, not the user's
            os.environ["HF_HUB_DISABLE_XET"] = "1"  # the server knows plain large files
            # its models would be of no use in the user's cache
            os.environ["HF_HUB_CACHE"] = stack.enter_context(TemporaryDirectory())
        os.environ.pop("HF_HUB_OFFLINE", None)
        push_and_load(args.model, args.repo, args.prompt)


def push_and_load(directory: Path, repo: str, prompt: str) -> None:
    """Uploads the directory in one commit, loads the model by its name and lets it write."""
    # imported late: the Hub's client reads the endpoint when it is imported
    from transformers import pipeline

    from optimum_arb import model_report
    from optimum_arb.hub import push_directory

    print(f"uploaded: {push_directory(directory, repo)}", flush=True)
    generate = pipeline("text-generation", model=repo)
    report = model_report(generate.model)
    print(f"loaded {repo}: {len(report.modules)} binarized modules at {report.bits_per_weight:.3f} true bits a weight")
    print(generate(prompt, max_new_tokens=16, do_sample=False)[0]["generated_text"])


if __name__ == "__main__":
    main()
