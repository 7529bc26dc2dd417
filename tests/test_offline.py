"""Nothing opens a socket where the Hub is switched off, and nothing that could run code is read."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from fresh_process import python
from safetensors.torch import load_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from optimum_arb import ARBConfig

RUN = """
import sys

def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise AssertionError(f"{event} {arguments}")

sys.addaudithook(refuse)
import torch
from transformers import AutoModelForCausalLM, pipeline
from optimum_arb import ARBConfig, save_model

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/float", quantization_config=ARBConfig(dataset=None))
save_model(model, None, folder + "/packed")
again = AutoModelForCausalLM.from_pretrained(folder + "/packed")
ids = torch.arange(5, 13)[None]
assert torch.equal(model(ids).logits, again(ids).logits)
try:
    AutoModelForCausalLM.from_pretrained("nobody/such-a-model")
except OSError as error:
    print(f"refused: {error}"[:60].splitlines()[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems open sockets inside the process")
def test_no_socket_is_opened(tmp_path):
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    done = python(RUN, tmp_path, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout


class Evil:
    """What makes a directory when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize("honest", [True, False])
def test_pickles_are_refused(tmp_path, honest):
    save_tiny(tmp_path / "float", "LlamaForCausalLM")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=ARBConfig(dataset=None))
    model.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    target = file.with_name("pytorch_model.bin")
    if honest:
        torch.save(load_file(file), target)
    else:
        target.write_bytes(pickle.dumps(Evil(str(tmp_path / "executed"))))
    file.unlink()
    with pytest.raises(ValueError, match="is loaded from safetensors files; this checkpoint has none"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not (tmp_path / "executed").exists()
