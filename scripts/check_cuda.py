"""What exlq does on a GPU, held against the CPU. Usage: python scripts/check_cuda.py

Converts the bundled model on both, with and without Triton's kernels, and runs their tests on the GPU. Where
there is no GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exlq.api import convert
from exlq.numerics import kernels
from exlq.pipeline.config import ConvertConfig

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = ("tests/numerics/test_triton.py", "tests/numerics/test_triton_compile.py")


@dataclass(frozen=True)
class Run:
    """One conversion of the bundled model."""

    name: str
    seconds: dict[str, float]
    kl: dict[str, float]  # by format
    files: dict[str, bytes]


def converted(name: str, device: str, directory: Path, bits: float) -> Run:
    """The bundled model by its bundled text, to both formats."""
    model = REPOSITORY / "tests" / "assets" / "tiny-llama"
    begin = time.perf_counter()
    summary: dict[str, Any] = convert(ConvertConfig(model, directory / name, bits=bits, device=device))
    stages = {**summary["seconds"], "all": time.perf_counter() - begin}
    kl = {key: output["evaluation"]["kl_mean"] for key, output in summary["outputs"].items()}
    paths = [path for output in summary["outputs"].values() for path in map(Path, output["paths"])]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    weights = {file.suffix: file.read_bytes() for file in files if file.suffix in (".gguf", ".safetensors")}
    return Run(name, stages, kl, weights)


def alike(one: Run, other: Run) -> dict[str, float]:
    """The share of equal bytes of the weights' files, by their suffix."""
    shares = {}
    for suffix, content in one.files.items():
        a, b = (torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (content, other.files[suffix]))
        shares[suffix] = (a == b).double().mean().item() if len(a) == len(b) else 0.0
    return shares


def without_triton(device: str, directory: Path, bits: float) -> Run:
    """A conversion on the GPU by the plain forms in torch."""
    before, kernels.TRITON = kernels.TRITON, False
    try:
        return converted("cuda, torch alone", device, directory, bits)
    finally:
        kernels.TRITON = before


def table(runs: list[Run]) -> list[str]:
    """Seconds of every stage and what became of it, a line each."""
    names = list(runs[0].seconds)
    lines = ["| | " + " | ".join(run.name for run in runs) + " |", "|---|" + "--:|" * len(runs)]
    lines += [
        f"| {name}, s | " + " | ".join(f"{run.seconds.get(name, 0.0):.1f}" for run in runs) + " |"
        for name in names
    ]
    lines += [
        f"| KL of {name} | " + " | ".join(f"{run.kl[name]:.5f}" for run in runs) + " |" for name in runs[0].kl
    ]
    shares = [alike(runs[0], run) for run in runs]
    lines += [
        f"| equal bytes, {suffix} | " + " | ".join(f"{share[suffix]:.2%}" for share in shares) + " |"
        for suffix in runs[0].files
    ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="of torch; default cuda:0")
    parser.add_argument("--bits", type=float, default=4.0, help="per weight; default 4")
    parsed = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing was checked")
        return 1
    print(f"{torch.cuda.get_device_name(parsed.device)}, torch {torch.__version__}, Triton {kernels.TRITON}")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *TESTS]
    tested = subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        runs = [converted("cpu", "cpu", directory, parsed.bits)]
        runs.append(converted("cuda", parsed.device, directory, parsed.bits))
        runs.append(without_triton(parsed.device, directory, parsed.bits))
    print("\n".join(table(runs)))
    near = all(run.kl[key] <= 1.1 * kl for run in runs[1:] for key, kl in runs[0].kl.items())
    print(
        f"tests {'passed' if tested == 0 else 'FAILED'}; divergence {'alike' if near else 'WORSE on the GPU'}"
    )
    return 0 if tested == 0 and near else 1


if __name__ == "__main__":
    sys.exit(main())
