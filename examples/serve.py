"""Serves a binarized model over HTTP by transformers' own server, and asks it for a completion.

    pip install "transformers[serving]"
    python examples/serve.py MODEL --prompt "The capital of France is"
    python examples/serve.py MODEL --stay                                   # goes on serving until Ctrl-C

`transformers serve` knows nothing of this package; it loads MODEL, a directory that `optimum-arb quantize` wrote, as it
loads any other model. It is made for trying things out; for many users at a time see docs/vllm.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")  # what `transformers serve` looks for
# without the script `transformers`, which may not be on the path
COMMAND = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a binarized model with transformers' server.")
    parser.add_argument("model", metavar="MODEL", type=Path, help="directory of a binarized model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--stay", action="store_true", help="go on serving until Ctrl-C")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for an answer (default: 300)")
    args = parser.parse_args()
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        parser.error(f"the server needs {', '.join(missing)}: pip install 'transformers[serving]'")
    model = str(args.model.resolve())
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([*COMMAND, model, "--host", "127.0.0.1", "--port", str(args.port)], env=environment)
    try:
        url = f"http://127.0.0.1:{args.port}"
        wait(server, url, args.timeout)
        asked = {"model": model, "prompt": args.prompt, "max_tokens": args.max_tokens, "temperature": 0}
        answer = request(f"{url}/v1/completions", asked, timeout=args.timeout)
        print(args.prompt + answer["choices"][0]["text"], flush=True)
        if args.stay:
            print(f"serving at {url}/v1", flush=True)
            server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def wait(server: subprocess.Popen, url: str, timeout: float) -> None:
    """Returns once the server answers.

    Raises:
        SystemExit: it has ended, or does not answer in time.
    """
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode}")
        try:
            request(f"{url}/health", timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise SystemExit(f"the server did not answer within {timeout:g} seconds")


def request(url: str, content: dict | None = None, timeout: float = 60) -> dict:
    """GET, or POST of a JSON object; the answer's JSON."""
    data = None if content is None else json.dumps(content).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=timeout) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
