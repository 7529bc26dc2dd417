"""The real client of the Hub against a server on loopback: uploads, their failures, and loading what was uploaded.

Three processes do all of it, since each pays for its imports: one uploads, one loads, one loads offline.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from fresh_process import python
from huggingface_hub import ModelCard
from loopback import Repository, serve
from tiny_models import outputs, save_tiny, text, tokens
from transformers import AutoModelForCausalLM

PROMPT = text(5)
FILES = {".gitattributes", "README.md", "arb_report.json", "config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
BASE_CARD = b"---\nlicense: other\nlicense_name: base-licence\nlanguage: en\n---\n# Base\n"
OWN_CARD = b"---\nlicense: mit\n---\nMy own words.\n"
OLD = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"old", "model-00002-of-00002.safetensors": b"old"}
OLD |= {"model.safetensors.index.json": b"{}", "adapter_model.safetensors": b"keep", "model.gguf": b"keep"}

UPLOAD = """
import contextlib, io, json, os, sys, time
import huggingface_hub
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum_arb import ARBConfig, save_model
from optimum_arb.commands.main import main
from optimum_arb.hub import check_access, push_directory

folder = sys.argv[1]
results = {}
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)  # between the client's attempts

def attempt(name, function):
    try:
        results[name] = str(function())
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]

def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("optimum-arb:")]
    return json.dumps([code, out.getvalue(), lines])

model = AutoModelForCausalLM.from_pretrained(
    "base/llama", quantization_config=ARBConfig(dataset=None, block_size=64)
)
model.generation_config.max_new_tokens = 7
tokenizer = AutoTokenizer.from_pretrained("base/llama")
attempt("push", lambda: model.push_to_hub("me/plain", commit_message="First", tags=["more"]))
attempt("sharded", lambda: model.push_to_hub("plain", max_shard_size="50KB", revision="shards"))
attempt("directory", lambda: save_model(model, tokenizer, f"{folder}/model", push_to_hub="me/model", private=True))
attempt("revision", lambda: model.save_pretrained(
    f"{folder}/saved", push_to_hub=True, repo_id="me/saved", revision="dev", private=True, commit_message="Second"))
attempt("replaced", lambda: model.push_to_hub("me/replaced"))
attempt("quantize", lambda: command(
    "quantize", "base/llama", f"{folder}/cli", "--no-calibration", "--method", "rtn", "--push-to-hub", "me/cli",
    "--revision", "rtn", "--json"))
attempt("command", lambda: command("push", f"{folder}/cli", "me/cli", "--json"))

attempt("public", lambda: model.push_to_hub("me/replaced", private=True))
attempt("broken blob", lambda: push_directory(f"{folder}/cli", "me/blob"))
attempt("broken commit", lambda: save_model(model, tokenizer, f"{folder}/kept", push_to_hub="me/commit"))
attempt("cut", lambda: command("push", f"{folder}/cli", "me/cut"))
attempt("wrong token", lambda: model.push_to_hub("me/other", token="hf_wrong"))
attempt("reader", lambda: check_access("me/other", token="hf_reader"))
attempt("reader upload", lambda: push_directory(f"{folder}/cli", "me/other", token="hf_reader"))
attempt("no name", lambda: check_access("me/a/b"))
attempt("no model", lambda: command("push", folder, "me/other"))
token = os.environ.pop("HF_TOKEN")
attempt("no token", lambda: check_access("me/other"))
os.environ["HF_TOKEN"] = token
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
attempt("no network", lambda: command(
    "quantize", "base/llama", f"{folder}/never", "--push-to-hub", "me/other"))
print(json.dumps(results))
"""

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, pipeline
ids = torch.tensor(json.loads(sys.argv[1]))
results = {"package": "optimum_arb" in sys.modules}

def attempt(name, repository, **options):
    try:
        with torch.no_grad():
            results[name] = AutoModelForCausalLM.from_pretrained(repository, **options)(ids).logits.sum().item()
    except Exception as error:
        results[name] = [type(error).__name__, str(error)]

for argument in sys.argv[3:]:
    name, repository, revision = argument.split(",")
    attempt(name, repository, revision=revision)
attempt("invisible", "me/saved", token="hf_wrong")
attempt("absent", "me/absent")
generate = pipeline("text-generation", model="me/model")
results["pipeline"] = generate(sys.argv[2], do_sample=False)[0]["generated_text"]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a base model, a model of another kind in the place of an upload, and a card that a user wrote."""
    folder = save_tiny(tmp_path_factory.mktemp("base"), "LlamaForCausalLM", tokenizer=True)
    with serve() as hub:
        base = {file.name: file.read_bytes() for file in folder.iterdir()} | {"README.md": BASE_CARD}
        hub.repositories["base/llama"] = Repository()
        hub.repositories["base/llama"].commit("main", base)
        hub.repositories["me/replaced"] = Repository()
        hub.repositories["me/replaced"].commit("main", OLD | {"README.md": OWN_CARD})
        for name in ("me/blob", "me/commit", "me/cut"):
            hub.repositories[name] = Repository()
            hub.repositories[name].commit("main", dict(OLD))
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Runs code as a user of that Hub, all with one cache."""
    home = tmp_path_factory.mktemp("home")

    def run(code, *arguments, **variables):
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_writer", "HF_HUB_OFFLINE": "0"}
        result = python(code, *arguments, **settings | {"HF_HUB_DISABLE_XET": "1"} | variables)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def uploaded(hub, client, folder):
    hub.faults = [
        (r"PUT /me/blob\.git/", 503),
        (r"POST /api/models/me/commit/commit/main", 500),
        (r"PUT /me/cut\.git/", 0),
    ]
    return client(UPLOAD, folder)


@pytest.fixture(scope="module")
def loaded(hub, uploaded, client):
    hub.requests.clear()
    ids = json.dumps(tokens(1, 8).tolist())
    names = ["cold,me/model,main", "warm,me/model,main", "revision,me/saved,dev", "shards,me/plain,shards"]
    return client(LOAD, ids, PROMPT, *names, "unknown,me/model,no-such")


def files(hub, name, revision="main"):
    return hub.repositories[name].files(revision)


def card(hub, name, revision="main"):
    return ModelCard(files(hub, name, revision)["README.md"].decode())


# Uploads


def test_push_to_hub(hub, uploaded):
    assert "/me/plain/commit/" in uploaded["push"]
    assert set(files(hub, "me/plain")) == FILES
    assert not hub.repositories["me/plain"].private
    data = card(hub, "me/plain").data
    assert data.tags == ["arb", "1-bit", "quantized", "more"]
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("base/llama", "quantized")
    assert (data.license, data.license_name, data.language) == ("other", "base-licence", "en")


def test_everything_travels_in_one_commit(hub, uploaded, folder):
    assert set(files(hub, "me/model")) == FILES | TOKENIZER
    assert hub.repositories["me/model"].private
    assert len(hub.repositories["me/model"].commits) == 2  # with the one that made it
    for name in (FILES | TOKENIZER) - {".gitattributes", "README.md"}:
        assert files(hub, "me/model")[name] == (folder / "model" / name).read_bytes()
    assert json.loads(files(hub, "me/model")["generation_config.json"])["max_new_tokens"] == 7
    assert (
        json.loads(files(hub, "me/model")["config.json"])["quantization_config"]["base_model"]["name"] == "base/llama"
    )
    text = card(hub, "me/model").text
    assert text.strip().splitlines()[0].startswith("To load this model, `pip install optimum-arb`")
    assert "from_pretrained('me/model'" in text


def test_save_pretrained_pushes_to_a_revision(hub, uploaded, folder):
    assert uploaded["revision"] == "None"
    assert set(files(hub, "me/saved", "dev")) == FILES
    assert set(files(hub, "me/saved")) == {".gitattributes"}
    assert hub.repositories["me/saved"].private
    assert (folder / "saved" / "model.safetensors").read_bytes() == files(hub, "me/saved", "dev")["model.safetensors"]


def test_weights_that_are_replaced_go_and_other_files_stay(hub, uploaded):
    found = files(hub, "me/replaced")
    assert set(found) == FILES - {".gitattributes"} | {"adapter_model.safetensors", "model.gguf"}
    assert found["README.md"] == OWN_CARD
    shards = files(hub, "me/plain", "shards")
    assert "model.safetensors" not in shards
    assert "model.safetensors.index.json" in shards


def test_quantize_uploads(hub, uploaded, folder):
    code, out, errors = json.loads(uploaded["quantize"])
    assert (code, errors) == (0, [])
    assert json.loads(out)["pushed_to"] == "me/cli"
    assert set(files(hub, "me/cli", "rtn")) == FILES | TOKENIZER
    code, out, _ = json.loads(uploaded["command"])
    assert (code, json.loads(out)["repo"]) == (0, "me/cli")
    assert set(files(hub, "me/cli")) == FILES | TOKENIZER


# Failures


@pytest.mark.parametrize(
    ("name", "repository", "error", "message"),
    [
        ("broken blob", "me/blob", "OSError", r"the Hub answered 503 \(planted by the test\)"),
        ("broken commit", "me/commit", "OSError", r"500.*as it was. The model is saved in .*kept; to try again: opt"),
        ("cut", "me/cut", None, r"cannot be reached .*What is there is whole: as it was, or"),
    ],
)
def test_a_broken_upload_leaves_both_sides_as_they_were(hub, uploaded, folder, name, repository, error, message):
    kind, told = (None, uploaded[name]) if error is None else uploaded[name]
    assert kind == error
    assert re.search(message, told)
    assert files(hub, repository) == OLD
    assert (folder / "cli" / "model.safetensors").read_bytes() == files(hub, "me/cli")["model.safetensors"]
    assert AutoModelForCausalLM.from_pretrained(folder / "kept") is not None


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wrong token", "PermissionError", "Could not upload .*does not accept the token .401.*hf auth login"),
        ("reader", "PermissionError", "the token of me may only read"),
        ("reader upload", "PermissionError", "does not let this token write there .403"),
        ("no token", "PermissionError", "no token was found.*hf auth login"),
        ("no name", "ValueError", "'me/a/b' is no name of a model on the Hub"),
        ("public", "ValueError", "me/replaced exists and is public"),
    ],
)
def test_refusals(hub, uploaded, name, error, message):
    assert uploaded[name][0] == error
    assert re.search(message, uploaded[name][1])
    assert "\n" not in uploaded[name][1]
    assert "me/other" not in hub.repositories


def test_one_message_of_the_command_line(uploaded, folder):
    code, out, errors = json.loads(uploaded["no network"])
    assert (code, out, len(errors)) == (2, "", 1)
    assert "Cannot upload to me/other: the Hub cannot be reached" in errors[0]
    assert not (folder / "never").exists()
    code, out, errors = json.loads(uploaded["no model"])
    assert (code, out, len(errors)) == (2, "", 1)
    assert "holds no model" in errors[0]


# Loading


def test_cold_and_warm_load_without_the_import(hub, uploaded, loaded, folder):
    assert loaded["package"] is False
    expected = outputs(AutoModelForCausalLM.from_pretrained(folder / "model"), tokens(1, 8)).sum().item()
    assert loaded["cold"] == pytest.approx(expected, rel=1e-5)
    assert loaded["warm"] == loaded["cold"]
    assert hub.requests.count("GET /me/model/resolve/main/model.safetensors") <= 1
    downloads = [r for r in hub.requests if r.startswith("GET /me/model/") and r.endswith("model.safetensors")]
    assert len(downloads) == 1


def test_revisions(loaded):
    assert loaded["revision"] == loaded["shards"] == loaded["cold"]
    assert loaded["unknown"][0] == "OSError"
    assert "no-such" in loaded["unknown"][1]


def test_what_cannot_be_seen(loaded):
    assert loaded["invisible"][0] == loaded["absent"][0] == "OSError"
    assert "me/saved" in loaded["invisible"][1]
    assert "me/absent" in loaded["absent"][1]


def test_pipeline(loaded, folder):
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(folder / "model"))
    assert loaded["pipeline"] == generate(PROMPT, do_sample=False)[0]["generated_text"]


def test_offline_from_the_cache(hub, loaded, client):
    hub.requests.clear()
    ids = json.dumps(tokens(1, 8).tolist())
    offline = client(LOAD, ids, PROMPT, "cached,me/model,main", "shards,me/plain,shards", HF_HUB_OFFLINE="1")
    assert hub.requests == []
    assert offline["cached"] == offline["shards"] == loaded["cold"]
    assert offline["pipeline"] == loaded["pipeline"]
    assert offline["absent"][0] == "OSError"


@torch.no_grad()
def test_the_tiny_base_model_differs(hub, loaded, tmp_path):
    """The numbers above are those of the binarized model."""
    for name, content in files(hub, "base/llama").items():
        (tmp_path / name).write_bytes(content)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert abs(outputs(base, tokens(1, 8)).sum().item() - loaded["cold"]) > 1e-2
