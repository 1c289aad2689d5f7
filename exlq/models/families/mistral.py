"""Mistral: Llama with a sliding window."""

from exlq.models.family import Family

MISTRAL = Family("mistral", ("MistralForCausalLM",), "mistral", exl2_architecture="MistralForCausalLM")
