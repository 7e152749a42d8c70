"""medprune: prune, recover and quantize LLaVA models, and know what it cost."""

__version__ = "0.1.0"
