"""The importance matrix of a model, held against transformers' own modules and llama.cpp's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from exlq.cli import main
from exlq.errors import CalibrationError, ConfigError, InputError, ModelError
from exlq.formats.gguf.imatrix import Imatrix, load
from exlq.models.model import Model
from exlq.pipeline import imatrix
from exlq.pipeline.imatrix import ImatrixConfig, collect, importance_matrix
from exlq.pipeline.plan import make_plan
from exlq.pipeline.progress import silent
from exlq.pipeline.requantize import Request, prepared, run
from exlq.workspace import Workspace
from tests.conftest import TinyMaker
from tests.formats.gguf.exported import write_f32
from tests.models.conftest import opened, whole_model
from tests.pipeline.helpers import Events, block_is_read, contents, settings, write_texts

CASES = [
    ("llama", False),
    ("llama", True),
    ("qwen2", True),
    ("phi3", False),
    ("gemma2", True),
    ("gemma3", True),
]
# Names of a GGUF file by those of transformers' modules, for a block.
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def hooked_sums(directory: Path, ids: Tensor, tied: bool) -> dict[str, Tensor]:
    """Σ x² of every linear's input, float64, under the names of a GGUF file."""
    model = whole_model(directory)
    sums: dict[str, Tensor] = {}

    def listen(module: torch.nn.Module, name: str) -> None:
        def hook(_module: object, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = inputs[0].double().square().flatten(0, -2).sum(0)

        module.register_forward_pre_hook(hook)

    for index, block in enumerate(model.model.layers):
        for path, name in MODULES.items():
            if path in dict(block.named_modules()):
                listen(block.get_submodule(path), f"blk.{index}.{name}.weight")
    listen(model.lm_head, "token_embd.weight" if tied else "output.weight")
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return sums


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_sums_are_those_of_hooks_on_transformers_modules(
    family: str, tied: bool, tiny: TinyMaker, tmp_path: Path
) -> None:
    directory = tiny(family, tied)
    ids = torch.randint(4, 260, (5, 48), generator=torch.Generator().manual_seed(2))
    model = opened(directory)
    entries = imatrix.file_entries(model, directory)
    found = importance_matrix(model, entries, ids, "text", Workspace(tmp_path), silent)
    wanted = hooked_sums(directory, ids, tied)
    assert found.entries.keys() == wanted.keys()
    for name, sums in wanted.items():
        assert torch.equal(found.entries[name].counts, torch.tensor([240.0])), name
        assert found.entries[name].sums.shape == (1, len(sums))
        torch.testing.assert_close(found.entries[name].sums[0].double(), sums, rtol=1e-4, atol=1e-6, msg=name)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("text",), 5, 48)
    assert contents(tmp_path) == {}


def test_linears_of_one_input_share_their_sums(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    found, _ = collect(config(llama, ids_file, tmp_path / "im.gguf"), silent)
    for same in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
        first, *others = (found.entries[f"blk.1.{name}.weight"].sums for name in same)
        assert all(torch.equal(first, other) for other in others)


def config(directory: Path, text: Path, output: Path, **more: Any) -> ImatrixConfig:
    return ImatrixConfig(directory, output, text, **{"rows": 24, "length": 64, **more})


def test_the_rows_are_those_a_conversion_calibrates_on(
    llama: Path, ids_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    real = imatrix.importance_matrix

    def listening(model: Model, entries: Any, ids: Tensor, *rest: Any) -> Imatrix:
        seen.append(ids)
        return real(model, entries, ids, *rest)

    monkeypatch.setattr(imatrix, "importance_matrix", listening)
    found, n_heldout = collect(config(llama, ids_file, tmp_path / "im.gguf"), silent)
    rows = make_plan(settings(llama, tmp_path / "out", ids_file)).rows
    assert torch.equal(seen[0], rows.ids[~rows.heldout])
    assert n_heldout == int(rows.heldout.sum()) == 3
    assert found.chunk_count == 21
    assert float(found.entries["output.weight"].counts) == 21 * 64


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_both_forms_load_back_and_quantize_reads_them(
    form: str, llama: Path, ids_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"im.{form}"
    found, _ = collect(config(llama, ids_file, path), silent)
    read = load(path)
    assert read.datasets == found.datasets == (ids_file.name,)
    assert read.chunk_count == 21
    assert read.entries.keys() == found.entries.keys()
    for name in found.entries:
        ours, theirs = found.importance(name), read.importance(name)
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0.0)
    assert set(contents(tmp_path)) == {path.name}
    write_f32(llama, tmp_path / "model.gguf")
    with prepared(Request(tmp_path / "model.gguf", tmp_path / "q.gguf", "Q4_0", imatrix=path)) as job:
        run(job, silent)
        assert [note for note in job.notes if "token_embd.weight" not in note] == []


def test_the_gguf_form_holds_what_llama_imatrix_writes(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    found, _ = collect(config(llama, ids_file, tmp_path / "im.gguf"), silent)
    reader = gguf.GGUFReader(tmp_path / "im.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 21
    assert reader.fields["imatrix.chunk_size"].contents() == 64
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert set(tensors) == {f"{name}.{part}" for name in found.entries for part in ("in_sum2", "counts")}
    for name, entry in found.entries.items():
        assert torch.equal(tensors[f"{name}.in_sum2"].flatten(), entry.sums[0])
        assert torch.equal(tensors[f"{name}.counts"].flatten(), entry.counts)


def test_the_command_says_what_it_wrote(
    llama: Path, ids_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "im.gguf"
    command = ["imatrix", "-i", str(llama), "-o", str(path), "-c", str(ids_file), "-r", "24", "-l", "64"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "error" not in shown.err
    assert "collecting 2/2" in shown.err
    assert (
        f"{path}: 15 entries from 21 rows of 64 tokens of {ids_file.name}; 3 more are held out" in shown.out
    )
    assert len(load(path).entries) == 15


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"rows": 1}, ConfigError),
        ({"length": 2}, ConfigError),
        ({"output": Path("absent") / "im.gguf"}, ConfigError),
        ({"output": Path()}, ConfigError),
        ({"device": "cuda:99"}, ConfigError),
        ({"in_dir": Path("absent")}, ModelError),
        ({"calibration": Path("absent.parquet")}, CalibrationError),
        ({"text_column": "absent"}, CalibrationError),
    ],
)
def test_what_cannot_work_is_refused_before_a_block_is_read(
    more: dict[str, Any],
    kind: type[InputError],
    llama: Path,
    ids_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Model, "block", block_is_read)
    given = {"in_dir": llama, "calibration": ids_file, "output": tmp_path / "im.gguf"} | more
    if "output" in more:
        given["output"] = tmp_path / more["output"]
    with pytest.raises(kind) as caught:
        collect(ImatrixConfig(**{"rows": 24, "length": 64, **given}), silent)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


def test_too_short_a_text_and_a_foreign_token_are_refused(llama: Path, tmp_path: Path) -> None:
    short = write_texts(tmp_path / "short.parquet", ["too short"])
    with pytest.raises(CalibrationError):
        collect(config(llama, short, tmp_path / "im.gguf"), silent)


def test_an_interruption_leaves_nothing_behind(llama: Path, ids_file: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect(config(llama, ids_file, tmp_path / "im.gguf"), Events(stop_at=("collecting", 1)))
    assert contents(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
