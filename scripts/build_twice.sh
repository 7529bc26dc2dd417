#!/usr/bin/env bash
# Builds the source archive and the wheel twice, in directories of different names and at different times, and compares
# them byte for byte; then installs the wheel into an empty environment and uses it.
#
#   scripts/build_twice.sh [--install] [DIRECTORY]       DIRECTORY (default: a temporary one) keeps what was built
#
# Needs pip, and git for the list of files. The second step, with --install, downloads all dependencies.
set -euo pipefail
unset PYTHONPATH # the wheel is what is used

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
install=no
if [ "${1:-}" = "--install" ]; then
    install=yes
    shift
fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
kept="${1:-$work/kept}"
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct)}"

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet "build==1.6.1" "setuptools==80.9.0"

mkdir "$work/source"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --target-directory="$work/source")

build() { # name of the directory, where the results go; the rights of files are in a wheel, so both have one umask
    mkdir -p "$work/$1" "$2"
    cp -r "$work/source" "$work/$1"
    # without isolation: the tools of both builds are the same
    (cd "$work/$1/source" && umask 022 && "$work/tools/bin/python" -m build --no-isolation --outdir "$2" . > "$work/$1/log") ||
        { cat "$work/$1/log"; exit 1; }
}

build first "$kept/first"
sleep 2 # so that no time of a file is the same
build the-second-one "$kept/second"
(cd "$kept/first" && sha256sum -- *) | tee "$work/sums"
(cd "$kept/second" && sha256sum --check --strict "$work/sums")
echo "Both builds are the same, byte for byte (SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH)."

if [ "$install" = yes ]; then
    python3 -m venv "$work/empty"
    "$work/empty/bin/pip" install --quiet "$kept"/first/*.whl
    cd "$work"
    "$work/empty/bin/optimum-arb" --help > "$work/help"
    HF_HUB_OFFLINE=1 "$work/empty/bin/python" - "$work/model" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import optimum_arb
from optimum_arb import ARBConfig, save_model
from optimum_arb.ops.backends.cpu import native

folder = sys.argv[1]
size = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(f"{folder}/float")
model = AutoModelForCausalLM.from_pretrained(f"{folder}/float", quantization_config=ARBConfig(dataset=None))
save_model(model, None, f"{folder}/packed")
again = AutoModelForCausalLM.from_pretrained(f"{folder}/packed")
ids = torch.arange(8)[None]
assert torch.equal(model(ids).logits, again(ids).logits)
assert "site-packages" in optimum_arb.__file__
print("installed into an empty environment: binarizes, saves and loads; native extension:", native.__name__)
PY
fi
