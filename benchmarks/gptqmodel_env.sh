#!/usr/bin/env bash
# Make the environment of benchmarks/gptqmodel_awq.py: gptqmodel pins a numpy that the project's own packages clash with.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-.venv-gptqmodel}"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0
"$folder/bin/pip" install -q gptqmodel==7.6.0 transformers==5.23.0 pillow
