"""Gemma: scaled embeddings, norms stored less one, tied."""

from exlq.models.family import Family

GEMMA = Family("gemma", ("GemmaForCausalLM",), "gemma", exl2_architecture="GemmaForCausalLM")
