"""Tiny models and tokens, as the pipeline's tests have them."""

from tests.pipeline.conftest import finished, ids_file, llama, sources_file

__all__ = ["finished", "ids_file", "llama", "sources_file"]
