"""What the tables of `bench_fidelity` share: the model, the texts, our conversions and their measurements."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from exlq.evaluation.divergence import Divergence, against
from exlq.evaluation.predictor import Blockwise, InLlamaCpp, Predictor
from exlq.evaluation.run import open_any
from exlq.pipeline import job
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import silent
from exlq.workspace import Workspace

# By text and then by what ran: the weights in float32, and a GGUF file as it is.
Scores = Mapping[str, tuple[Divergence, ...]]
Compared = Callable[[Predictor], Divergence]


@dataclass(frozen=True)
class Made:
    """A quantized model: the GGUF file or the EXL2 directory, bytes of its weights, seconds it took."""

    path: Path
    bytes: int
    bpw: float  # over `weights`
    weights: int  # of a GGUF file in all matrices, of EXL2 in the decoder's linears
    seconds: float


@dataclass(frozen=True)
class Bench:
    """`config` is without a target; `texts` are token rows, (n, length) int64, by name."""

    config: ConvertConfig
    plan: Plan
    texts: Mapping[str, Tensor]
    threads: int
    scratch: Path
    seconds: dict[str, float] = field(default_factory=dict)  # of what was measured

    @cached_property
    def base(self) -> Path:
        """The F32 GGUF file."""
        untouched = replace(self.config, gguf_type="F32", formats=("gguf",), output_measurement=None)
        return _weights(converted(replace(untouched, out_dir=self.scratch / "base"), "gguf"))

    def ours(self, config: ConvertConfig, kind: str) -> Made:
        """A conversion with a target, its measurement taken or found; `kind` is gguf or exl2."""
        out = self.scratch / "ours"
        shutil.rmtree(out, ignore_errors=True)
        path = self._measurement(config)
        begin = time.perf_counter()
        settings = replace(config, formats=(kind,), measurement=path, output_measurement=None, out_dir=out)
        result = converted(settings, kind)
        bpw = result["file_bpw"] if kind == "gguf" else result["bpw"]
        return Made(_weights(result), result["bytes"], bpw, self.weights(kind), time.perf_counter() - begin)

    def weights(self, kind: str) -> int:
        """The weights that bits are counted over, the one matrix of a tied head and embedding once."""
        if kind == "exl2":
            return self.plan.numel
        left_out = {self.plan.model.head.key} if self.plan.model.tied else set()
        return sum(spec.numel for key, spec in self.plan.specs.items() if key not in left_out)

    def _measurement(self, config: ConvertConfig) -> Path:
        """The file of the measurement that a conversion asks for; one for all that may share it."""
        measuring = replace(config, bits=None, file_size=None, no_resume=True)
        origin = json.dumps(make_plan(measuring).origin, sort_keys=True, default=dict)
        path = self.scratch / f"measurement-{hashlib.sha256(origin.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            begin = time.perf_counter()
            job.run(job.begin(replace(measuring, output_measurement=path), silent, ""))
            self.seconds[f"ours ({len(self.seconds) + 1})"] = time.perf_counter() - begin
        return path

    @contextmanager
    def in_llama_cpp(self) -> Iterator[Callable[[Path, bool], Scores]]:
        """A function that scores a GGUF file, with the flag as it is beside its weights alone."""
        with ExitStack() as held:
            base = InLlamaCpp(self.base, self.threads)
            by_text = {n: held.enter_context(against(base, rows)) for n, rows in self.texts.items()}

            def scored(path: Path, whole: bool) -> Scores:
                weights = self.scratch / "weights.gguf"
                runs = [InLlamaCpp(path, self.threads, copy=weights)]
                runs += [InLlamaCpp(path, self.threads)] if whole else []
                found = {name: tuple(map(compared, runs)) for name, compared in by_text.items()}
                weights.unlink()
                return found

            yield scored

    @contextmanager
    def in_torch(self) -> Iterator[Callable[[Path], Scores]]:
        """A function that scores an EXL2 directory."""
        device = self.plan.model.device

        def run(model: Path, name: str) -> Blockwise:
            return Blockwise(open_any(model, device), Workspace(self.scratch), name)

        with ExitStack() as held:
            by_text: dict[str, Compared] = {}
            for i, (name, rows) in enumerate(self.texts.items()):
                base = run(self.config.in_dir, f"base-{i}")
                by_text[name] = held.enter_context(against(base, rows))
            yield lambda path: {n: (compared(run(path, "other")),) for n, compared in by_text.items()}


def converted(config: ConvertConfig, kind: str) -> Mapping[str, Any]:
    """What the summary of a conversion says of its one output."""
    summary = job.run(job.begin(config, silent, ""))
    assert summary is not None
    result: Mapping[str, Any] = summary["outputs"][kind]
    return result


def _weights(result: Mapping[str, Any]) -> Path:
    """The GGUF file, or the EXL2 directory, of a conversion."""
    return next(Path(path) for path in result["paths"] if not path.endswith(".txt"))
