"""Names of GGUF files."""

from __future__ import annotations

import re
from collections.abc import Sequence

import gguf

from exlq.formats.gguf.values import KeyValue

_NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")


def file_name(metadata: Sequence[KeyValue], encoding: str) -> str:
    """`{base name or name}-{size}-{finetune}-{version}-{encoding}.gguf`, as far as `general.*` tells them.

    `encoding` stands as it is given: `Q4_K_M`, `5.00bpw`, `4.20GiB`.
    """
    told = {entry.key: str(entry.value) for entry in metadata}
    # gguf would put the encoding in capitals, wrong for units
    stem = gguf.naming_convention(
        told.get("general.name"),
        told.get("general.basename"),
        told.get("general.finetune"),
        told.get("general.version"),
        told.get("general.size_label"),
        None,
    )
    clean = _NOT_IN_A_NAME.sub("-", stem).strip("-.")
    return f"{clean or 'model'}-{encoding}.gguf"
