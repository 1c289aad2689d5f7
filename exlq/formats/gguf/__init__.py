"""GGUF files: container, metadata, tokenizer, tensor names, recipes and importance matrices."""
