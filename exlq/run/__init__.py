"""Models that answer: text continued, conversations held, a GGUF file served over HTTP."""
