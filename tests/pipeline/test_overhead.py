"""What a measurement says that a file takes beside its matrices."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from tests.pipeline.conftest import Finished

TARGET_TEXT_BYTES = 64  # of a GGUF file: the length of the target's text, and the padding after it


def test_overhead_and_matrices_add_up_to_the_files(both: Finished) -> None:
    record = json.loads((both.config.out_dir / "measurement.json").read_text(encoding="utf-8"))
    sizes = {
        (linear["key"], option["desc"]): int(option["total_bits"]) // 8
        for linear in record["measurement"]
        for option in linear["options"]
    }
    for kind, chosen in ((kind, both.summary["outputs"][kind]["allocation"]) for kind in ("exl2", "gguf")):
        matrices = sum(sizes[key, desc] for key, desc in chosen.items() if (key, desc) in sizes)
        if kind == "gguf":
            whole = both.summary["outputs"][kind]["bytes"]
            assert abs(whole - matrices - record["overhead_bytes"][kind]) <= TARGET_TEXT_BYTES
        else:
            stored = (load_file(path).values() for path in both.model.glob("*.safetensors"))
            whole = sum(tensor.numel() * tensor.element_size() for tensors in stored for tensor in tensors)
            embedding = sizes["model.embed_tokens", "f16"]
            assert whole == matrices + embedding + record["overhead_bytes"][kind]
