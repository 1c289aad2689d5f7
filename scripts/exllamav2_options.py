"""The tied ways in which ExLlamaV2 0.3.2 may store attention, MLP and head."""

from __future__ import annotations

from exlq.types import Option

# One row per way of a module. A matrix's part of it: share:width_groupsize, widths falling.
_ATTENTION = """
0.05:3b_64g/0.95:2b_64g 0.05:3b_64g/0.95:2b_64g 0.05:3b_64g/0.95:2b_64g 0.05:3b_64g/0.95:2b_64g
0.1:3b_64g/0.9:2b_64g   0.1:3b_64g/0.9:2b_64g   0.25:3b_64g/0.75:2b_64g 0.1:3b_64g/0.9:2b_64g
0.1:3b_64g/0.9:2b_64g   0.1:3b_64g/0.9:2b_64g   0.1:4b_128g/0.9:3b_128g 0.1:3b_64g/0.9:2b_64g
0.1:3b_64g/0.9:2b_64g   0.1:3b_64g/0.9:2b_64g   0.1:4b_128g/0.9:3b_128g 0.1:4b_128g/0.9:3b_128g
0.1:4b_128g/0.9:3b_128g 0.1:4b_128g/0.9:3b_128g 0.1:4b_128g/0.9:3b_128g 0.1:4b_128g/0.9:3b_128g
0.1:4b_128g/0.9:3b_128g 0.1:4b_128g/0.9:3b_128g 0.1:4b_64g/0.9:3b_64g   0.1:4b_128g/0.9:3b_128g
1:4b_128g               1:4b_128g               1:4b_128g               1:4b_128g
1:4b_128g               1:4b_128g               1:4b_64g                1:4b_128g
1:4b_64g                1:4b_64g                1:4b_32g                1:4b_64g
1:4b_32g                1:4b_32g                1:4b_32g                1:4b_32g
0.1:5b_128g/0.9:4b_128g 0.1:5b_128g/0.9:4b_128g 0.1:5b_64g/0.9:4b_64g   0.1:5b_128g/0.9:4b_128g
0.1:5b_64g/0.9:4b_64g   0.1:5b_64g/0.9:4b_64g   0.1:5b_32g/0.9:4b_32g   0.1:5b_64g/0.9:4b_64g
0.1:5b_64g/0.9:4b_64g   0.1:5b_64g/0.9:4b_64g   1:5b_64g                0.1:5b_64g/0.9:4b_64g
0.1:5b_32g/0.9:4b_32g   0.1:5b_32g/0.9:4b_32g   1:5b_32g                0.1:5b_32g/0.9:4b_32g
0.1:6b_128g/0.9:5b_128g 0.1:6b_128g/0.9:5b_128g 1:6b_128g               0.1:6b_128g/0.9:5b_128g
0.1:6b_32g/0.9:5b_32g   0.1:6b_32g/0.9:5b_32g   1:6b_32g                0.1:6b_32g/0.9:5b_32g
1:6b_128g               1:6b_128g               1:6b_128g               1:6b_128g
1:6b_32g                1:6b_32g                1:8b_32g                1:6b_32g
1:8b_128g               1:8b_128g               1:8b_128g               1:8b_128g
"""
_MLP = """
0.05:3b_64g/0.95:2b_64g 0.05:3b_64g/0.95:2b_64g   0.05:6b_32g/0.2:3b_64g/0.75:2b_64g
0.1:3b_64g/0.9:2b_64g   0.25:3b_64g/0.75:2b_64g   0.05:6b_32g/0.2:3b_64g/0.75:2b_64g
0.1:3b_64g/0.9:2b_64g   0.3:3b_64g/0.7:2b_64g     0.05:5b_32g/0.95:3b_32g
0.1:3b_64g/0.9:2b_64g   0.3:3b_64g/0.7:2b_64g     0.05:5b_32g/0.95:4b_32g
0.1:4b_128g/0.9:3b_128g 0.25:4b_128g/0.75:3b_128g 0.05:8b_32g/0.1:4b_128g/0.85:3b_128g
0.1:4b_32g/0.9:3b_32g   0.25:4b_32g/0.75:3b_32g   0.05:8b_32g/0.1:4b_32g/0.85:3b_32g
0.1:4b_32g/0.9:3b_32g   0.25:4b_32g/0.75:3b_32g   0.05:8b_32g/0.95:4b_128g
1:4b_128g               1:4b_32g                  0.05:8b_32g/0.95:4b_128g
1:4b_32g                1:4b_32g                  0.05:8b_32g/0.95:4b_32g
0.1:5b_128g/0.9:4b_128g 0.25:5b_128g/0.75:4b_128g 0.05:8b_32g/0.1:5b_128g/0.85:4b_128g
0.1:5b_32g/0.9:4b_32g   0.25:5b_32g/0.75:4b_32g   0.05:8b_32g/0.1:5b_32g/0.85:4b_32g
0.1:6b_128g/0.9:5b_128g 0.25:6b_128g/0.75:5b_128g 0.05:8b_32g/0.1:6b_128g/0.85:5b_128g
0.1:6b_32g/0.9:5b_32g   0.25:6b_32g/0.75:5b_32g   0.05:8b_32g/0.1:6b_32g/0.85:5b_32g
1:6b_128g               1:6b_128g                 0.05:8b_32g/0.95:6b_128g
0.1:8b_128g/0.9:6b_128g 0.1:8b_128g/0.9:6b_128g   0.15:8b_128g/0.85:6b_128g
0.1:8b_128g/0.9:6b_128g 0.1:8b_128g/0.9:6b_128g   1:8b_128g
1:8b_128g               1:8b_128g                 1:8b_128g
"""


def option(desc: str) -> Option:
    """`0.1:4b_128g/0.9:3b_128g` with the parameters it stands for."""
    parts = [part.replace("b_", ":").rstrip("g").split(":") for part in desc.split("/")]
    return Option(
        f"{desc} s4",
        {
            "group_size": {bits: int(size) for _, bits, size in parts},
            "bits": [int(bits) for _, bits, _ in parts],
            "bits_prop": [float(share) for share, _, _ in parts],
            "scale_bits": 4,
        },
    )


def _ways(table: str, *names: str) -> tuple[dict[str, Option], ...]:
    rows = [line.split() for line in table.strip().splitlines()]
    return tuple({name: option(desc) for name, desc in zip(names, row, strict=True)} for row in rows)


# Child of a block → the ways to store it, each an option by the linear's last name.
MODULES = {
    "self_attn": _ways(_ATTENTION, "q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": _ways(_MLP, "gate_proj", "up_proj", "down_proj"),
}
HEAD_BITS = 6
HEAD = option("0.15:8b_128g/0.85:6b_128g")  # for that many
