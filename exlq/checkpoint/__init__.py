"""A model directory on disk: its tensors, read lazily, and the hashes that identify it."""

from exlq.checkpoint.hashes import file_hashes, tokenizer_hash
from exlq.checkpoint.open import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "file_hashes", "open_checkpoint", "tokenizer_hash"]
