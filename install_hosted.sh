#!/usr/bin/env bash
# Install medprune on Kaggle or Colab beside the preinstalled torch, which is kept, or say what clashes with it.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
keep=$(mktemp)
"$python" -m pip list --format=freeze | grep -E "^(torch|torchvision|torchaudio|numpy|pandas|scipy)==" > "$keep"
"$python" -m pip install -q -c "$keep" -r requirements-kaggle.txt
"$python" -m pip install -q --no-deps -e .
