"""medprune: prune, recover and quantize LLaVA models, and know what it cost."""

__version__ = "0.2.0"  # CHANGELOG.md says what its numbers mean
