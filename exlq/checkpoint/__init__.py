"""A model directory on disk: its tensors, read lazily, and the hashes that identify it."""
