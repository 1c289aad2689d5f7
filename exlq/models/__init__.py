"""Block-by-block execution of causal language models over transformers."""
