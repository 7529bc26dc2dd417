"""`evaluate --baseline` and its reports, and `verify`."""

from __future__ import annotations

import html.parser
import json
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_arb.commands.evaluate import chosen_parts
from optimum_arb.commands.main import main
from optimum_arb.evaluate import perplexity
from optimum_arb.evaluate.accuracy import divergence
from optimum_arb.evaluate.evaluation import read_comparison
from optimum_arb.reproduce import model_fingerprint, text_fingerprint

WORDS = "the lobster is a species of lobster and it is the largest of all in the sea " * 20
FAST = ("--context-length", 16, "--max-windows", 5, "--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1)
FAST += ("--batch-sizes", "1,2", "--energy-seconds", "0.05", "--sample-tokens", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def run(float_model, binarized_model, text, tmp_path_factory):
    """Everything that can be measured, once; the reports that were written."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("report")
    arguments = ["evaluate", binarized_model, "--baseline", float_model, "--text", text, *FAST, "--report", out]
    arguments += ["--report", out / "extra.md", "--price-per-hour", "3.6", "--prompt", "the <lobster> &"]
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads((out / "report.json").read_text()), out


def test_figures_are_those_of_the_library(run, float_model, binarized_model, text):
    report, _ = run
    base, model = report["models"]
    assert (base["role"], model["role"], report["baseline"]) == ("baseline", "model", str(float_model))
    loaded = [AutoModelForCausalLM.from_pretrained(path) for path in (binarized_model, float_model)]
    tokenizer = AutoTokenizer.from_pretrained(float_model)
    expected = divergence(*loaded, tokenizer, text, 16, 5)
    (found,) = model["divergence"]
    for key in ("kl_divergence", "top1_agreement", "perplexity_ratio"):
        assert found[key] == pytest.approx(getattr(expected, key), rel=1e-5)
    for one, result in zip(loaded, (model, base), strict=True):
        value = perplexity(one, tokenizer, text, 16, 5).perplexity
        assert result["perplexity"][0]["perplexity"] == pytest.approx(value, rel=1e-5)
    assert model["bits_per_weight"] == pytest.approx(loaded[0].config.quantization_config.bits_per_weight)
    assert base["bits_per_weight"] == 32
    assert model["disk"]["weights"] == (binarized_model / "model.safetensors").stat().st_size
    assert [row["batch_size"] for row in model["latency"]] == [1, 2]
    assert model["memory"]["parameters"] < base["memory"]["parameters"]
    assert len(model["modules"]) == 13
    for row, cost in zip(model["latency"], model["cost"], strict=True):
        # 3.6 an hour is a thousandth a second
        assert cost["generated_million_tokens"] == pytest.approx(1e3 / row["decode_tokens_per_second"])
        assert cost["prompt_million_tokens"] == pytest.approx(1e3 / row["prefill_tokens_per_second"])
    assert all(model["energy"]["available"] or model["energy"]["missing"] for model in report["models"])


def test_reproduce_block(run, float_model, binarized_model):
    block = run[0]["reproduce"]
    assert block["datasets"] == {"text.txt": text_fingerprint(WORDS)}
    assert block["models"][str(binarized_model)]["fingerprint"] == model_fingerprint(binarized_model)
    assert block["seed"] == 0
    assert block["threads"] >= 1
    assert {"optimum_arb", "torch", "transformers"} <= set(block["versions"])
    assert block["command"]


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps what would be loaded from elsewhere, and all ids."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.ids, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.loaded.append(value)
        assert tag not in ("script", "link", "img", "iframe")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_loads_nothing(run):
    report, out = run
    source = (out / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert (page.open, page.loaded) == ([], [])
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r"url\(#([^)]+)\)", source)) <= set(page.ids)
    assert "@import" not in source
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", source)
    for heading in ("Accuracy", "Layers", "Memory", "Speed", "Energy", "Cost", "Samples", "Reproduce"):
        assert heading in page.text
    assert source.count("<svg") == 3  # layers, memory, speed; one point needs no plot of perplexity against bits
    assert "the <lobster> &" in page.text  # escaped in the source
    assert "prefers-color-scheme: dark" in source
    assert "width=device-width" in source
    # no stand-in colour of matplotlib's is left
    assert not re.search(r"#0101|#0102", source)
    agreement = report["models"][1]["divergence"][0]["top1_agreement"]
    assert f"{agreement:.1%}" in page.text


def test_markdown(run):
    _, out = run
    found = (out / "report.md").read_text()
    assert found == (out / "extra.md").read_text()
    for line in found.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    assert "## Speed" in found
    block = json.loads(re.search(r"```json\n(.*?)\n```", found, re.DOTALL)[1])
    assert block["versions"]


def test_several_models_and_a_comparison(call, float_model, binarized_model, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    other = tmp_path / "rtn"
    call("quantize", float_model, other, "--method", "rtn", "--no-calibration")
    rows = {}
    for name, bits in (("full", 32.0), ("hqq:2", 2.5)):
        measured = {"perplexity": 80.0, "text": "text.txt", "context_length": 16, "windows": 5}
        rows[name] = {"bits_per_weight": bits, "perplexity": measured}
    rows["broken"] = {"error": "no memory"}
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows}))
    options = ("--text", text, *FAST[:4], "--measure", "perplexity", "--compare", tmp_path)
    page = tmp_path / "page.html"
    out = call("evaluate", binarized_model, other, "--baseline", float_model, *options, "--report", page)
    assert "rtn" in out
    source = page.read_text()
    assert source.count("<svg") == 3  # perplexity against bits, and the layers of each
    for label in ("hqq:2", "binarized", "rtn"):
        assert label in source
    options = (*options[:2], *FAST, "--measure", "all", "--leave-out", "memory", "--json")
    report = call("evaluate", other, *options)
    assert report["baseline"] is None
    assert "divergence" not in report["models"][0]
    assert report["models"][0]["latency"][0]["decode_speedup"] is None
    rows["hqq:2"]["perplexity"]["windows"] = 6
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows}))
    with pytest.raises(ValueError, match=r"'hqq:2'.*windows=6, and here it is 5"):
        read_comparison(tmp_path, report)


def test_parts():
    everything = ("perplexity", "divergence", "generation", "memory", "latency", "energy")
    assert chosen_parts(None, None, None, None) == ("perplexity",)
    assert chosen_parts(None, None, "base", None) == everything
    assert chosen_parts(None, "energy, memory", "base", "piqa") == (
        "perplexity", "divergence", "tasks", "generation", "latency",
    )  # fmt: skip
    assert chosen_parts("latency,perplexity", None, None, None) == ("perplexity", "latency")
    assert "divergence" not in chosen_parts("all", None, None, None)
    with pytest.raises(ValueError, match="--measure 'speed' is nothing that can be measured"):
        chosen_parts("speed", None, None, None)
    with pytest.raises(ValueError, match="--leave-out 'speed'"):
        chosen_parts(None, "speed", "base", None)


def test_evaluate_bad_input(fail, float_model, binarized_model, text, tmp_path):
    options = ("--baseline", float_model, "--text", text, *FAST)
    assert "a report is written as .html" in fail("evaluate", binarized_model, *options, "--report", "report.docx")
    assert "must be named once" in fail("evaluate", float_model, *options)
    assert "is from a baseline" in fail("evaluate", float_model, "--measure", "divergence", "--text", text)
    assert "goes with the perplexity of one model" in fail("evaluate", binarized_model, *options, "--record")
    assert "no list of numbers" in fail("evaluate", binarized_model, *options, "--batch-sizes", "1,a")
    assert "There is no comparison" in fail(
        "evaluate", binarized_model, "--text", text, *FAST, "--compare", tmp_path / "missing"
    )
    message = fail("evaluate", binarized_model, "--measure", "memory", "--prompt-tokens", "57")
    assert "prompt_tokens=57 and new_tokens=8 are more than the 64 positions of the model" in message


def test_another_tokenizer_is_refused(fail, binarized_model, tmp_path, text):
    from tiny_models import save_tiny

    other = save_tiny(tmp_path / "other", "LlamaForCausalLM", tokenizer=True)
    message = fail("evaluate", binarized_model, "--baseline", other, "--text", text, "--measure", "divergence")
    assert "cut text into different tokens" in message


# verify


@pytest.fixture
def verify(float_model, binarized_model, text, tmp_path, capsys):
    """Writes thresholds, runs the command, returns its exit code and its JSON object."""

    def run(content, *more, measure=""):
        path = tmp_path / "verify.toml"
        path.write_text(
            f"{content}\n[measure]\ntext = {json.dumps(str(text))}\ncontext_length = 16\nmax_windows = 5\n{measure}"
        )
        capsys.readouterr()
        options = ["--thresholds", path, "--baseline", float_model, "--json", *more]
        code = main([str(argument) for argument in ("verify", binarized_model, *options)])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else captured.err

    return run


def test_kept_and_missed_thresholds(verify, run):
    model = run[0]["models"][1]
    bits, found = model["bits_per_weight"], model["divergence"][0]
    kept = f"max_bits_per_weight = {bits + 0.01}\nmax_perplexity_ratio = {found['perplexity_ratio'] * 1.01}\n"
    code, result = verify(kept + "min_top1_agreement = 0")
    assert (code, result["passed"], [check["passed"] for check in result["checks"]]) == (0, True, [True] * 3)
    missed = f"max_bits_per_weight = {bits / 1.25}\nmax_kl_divergence = {found['kl_divergence'] * 2}"
    code, result = verify(missed)
    assert (code, result["passed"]) == (1, False)
    first, second = result["checks"]
    assert (first["passed"], second["passed"]) == (False, True)
    assert first["excess"] == pytest.approx(0.25)
    assert second["excess"] == pytest.approx(-0.5)
    assert first["measured"] == pytest.approx(bits)


def test_only_what_is_needed_is_measured(verify, monkeypatch):
    from optimum_arb.evaluate import evaluation

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(evaluation, "_load", never)
    monkeypatch.setattr(evaluation, "measure_memory", never)
    code, result = verify("max_bits_per_weight = 9\nmax_file_bytes_ratio = 1\nmax_output_error = 1")
    assert code == 0
    assert result["report"]["settings"]["parts"] == []


def test_speed_and_memory(verify, monkeypatch):
    from optimum_arb.evaluate import evaluation

    memory = {"resident": 10**6, "gpu_resident": None}
    monkeypatch.setattr(evaluation, "measure_memory", lambda *args: memory)
    limits = "min_tokens_per_second_ratio = 1e-6\nmax_resident_memory_bytes = 1e12\nmin_tokens_per_second = 1e12"
    code, result = verify(limits, measure="prompt_tokens = 8\nnew_tokens = 4\nrepeats = 1\nbatch_sizes = [1, 2]")
    assert code == 1
    assert [check["passed"] for check in result["checks"]] == [True, True, False]
    slowest = min(row["decode_tokens_per_second"] for row in result["report"]["models"][1]["latency"])
    assert result["checks"][2]["measured"] == slowest
    assert "perplexity" not in result["report"]["models"][1]


def test_what_cannot_be_measured_fails(verify, monkeypatch, tmp_path):
    from optimum_arb.evaluate import energy

    monkeypatch.setattr(energy, "find_meters", lambda models, powercap: ([], ["no counter here"]))
    code, result = verify("max_joules_per_token = 10", measure="prompt_tokens = 4\nnew_tokens = 4")
    assert code == 1
    (check,) = result["checks"]
    assert (check["measured"], check["passed"]) == (None, False)
    assert "not available: no counter here" in check["what"]
    code, result = verify("max_held_out_error = 1")  # that run held nothing out
    assert code == 1
    assert "not recorded" in result["checks"][0]["what"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_perplexity_ration = 1", "is 'max_perplexity_ratio' meant?"),
        ("max_perplexity = true", "max_perplexity = True must be a number"),
        ("max_perplexity = 'low'", "must be a number"),
        ("max_perplexity = nan", "must be a number"),
        ("max_perplexity = ", "is no TOML file"),
        ("", "sets no threshold"),
        ("tasks.piqa = 1", "must name a metric"),
    ],
)
def test_bad_thresholds_are_bad_usage(verify, content, message):
    code, error = verify(content)
    assert code == 2
    assert message in error


def test_bad_measure_and_missing_baseline(verify, fail, binarized_model, tmp_path):
    code, error = verify("max_perplexity = 9", measure="windows = 3")
    assert code == 2
    assert "unknown key 'windows'" in error
    code, error = verify("max_perplexity = 9", measure="batch_sizes = ['1']")
    assert code == 2
    assert "measure.batch_sizes must be a list of whole numbers" in error
    path = tmp_path / "ratio.toml"
    path.write_text("max_bits_per_weight = 9\nmax_perplexity_ratio = 2")
    assert "max_perplexity_ratio is a comparison" in fail("verify", binarized_model, "--thresholds", path)
    assert "There is no file of thresholds" in fail("verify", binarized_model, "--thresholds", tmp_path / "none.toml")


def test_readable_output(capsys, binarized_model, tmp_path):
    path = tmp_path / "verify.toml"
    path.write_text("max_bits_per_weight = 1\nmax_file_bytes = 1e9")
    assert main(["verify", str(binarized_model), "--thresholds", str(path)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^FAILED +max_bits_per_weight +1 +[\d.]+ +[\d.]+% beyond", out, re.MULTILINE)
    assert re.search(r"^ok +max_file_bytes", out, re.MULTILINE)
    assert "1 of 2 failed" in out


@pytest.mark.parametrize("more", ["", "max_perplexity = 1e9\n"])
def test_a_model_that_is_not_binarized_has_no_true_bits(capsys, float_model, text, tmp_path, more):
    path = tmp_path / "verify.toml"
    measure = f'[measure]\ntext = "{text}"\ncontext_length = 16\nmax_windows = 1\n'
    path.write_text(f"max_bits_per_weight = 32\n{more}{measure}")
    assert main(["verify", str(float_model), "--thresholds", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["checks"][0]
    assert (found["passed"], found["measured"]) == (False, None)
    assert found["what"] == "true bits per weight: the model is not binarized by optimum_arb"
