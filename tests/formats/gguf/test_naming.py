"""Names of files, read back with the gguf package's own parts."""

from __future__ import annotations

import gguf
import pytest
from gguf import GGUFValueType

from exlq.formats.gguf.naming import file_name
from exlq.formats.gguf.values import KeyValue


def told(**values: str) -> list[KeyValue]:
    return [KeyValue(f"general.{key}", value, GGUFValueType.STRING) for key, value in values.items()]


@pytest.mark.parametrize(
    ("metadata", "encoding", "name"),
    [
        (
            told(name="Llama 3.1 8B", basename="Llama-3.1", size_label="8B", finetune="Instruct"),
            "5.00bpw",
            "Llama-3.1-8B-Instruct-5.00bpw.gguf",
        ),
        (told(name="My Model", size_label="18M", version="v2"), "Q4_K_M", "My-Model-18M-v2-Q4_K_M.gguf"),
        (told(name="m", size_label="1K"), "4.20GiB", "m-1K-4.20GiB.gguf"),
        (told(name="../../etc/x", finetune="a/b\\c\n"), "F32", "etc-x-a-b-c-F32.gguf"),
        (told(), "F32", "ggml-model-F32.gguf"),
    ],
)
def test_the_name_tells_model_size_and_encoding(metadata: list[KeyValue], encoding: str, name: str) -> None:
    assert file_name(metadata, encoding) == name


def test_a_recipe_is_named_as_the_gguf_package_names_it() -> None:
    metadata = told(name="a b", size_label="7B", version="v1.5")
    expected = gguf.naming_convention("a b", None, None, "v1.5", "7B", "Q4_K_M")
    assert file_name(metadata, "Q4_K_M") == f"{expected}.gguf"
