"""What is looked into, held against the libraries that made it and against what is known."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors import safe_open
from safetensors.torch import save_file

from exlq.cli import main
from exlq.cli.arguments.inspect import SORTS
from exlq.errors import ConfigError, InputError
from exlq.formats import exl2
from exlq.inspect import ORDERS, Entry, Inspection, by_layer, inspect, select
from exlq.inspect.record import natural
from exlq.measurement import load

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MEASUREMENT = REPOSITORY / "measurements" / "tiny-llama.json"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """Two blocks of made matrices of several types, by the gguf package."""
    path = tmp_path / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Made")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(1000)])
    writer.add_float32("made.not_a_number", math.nan)
    rng = np.random.default_rng(0)
    for layer in range(2):
        for name, kind in (("attn_q", GGMLQuantizationType.Q4_0), ("ffn_down", GGMLQuantizationType.Q8_0)):
            values = gguf.quants.quantize(rng.standard_normal((8, 64), dtype=np.float32), kind)
            writer.add_tensor(f"blk.{layer}.{name}.weight", values, raw_dtype=kind)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def exl2_directory(folder: Path, tiny_llama: Path, key: str = "model.layers.0.self_attn.q_proj") -> Path:
    """One linear of 256 × 256 with 64 channels of 4 bits and 192 of 3, in groups of 32."""
    folder.mkdir(parents=True)
    config = json.loads((tiny_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "exl2", "bits": 3.3, "head_bits": 6}
    (folder / "config.json").write_text(json.dumps(config))
    pairs, row = [], 0
    for bits in (4, 4, 3, 3, 3, 3, 3, 3):
        pairs += [bits, row]
        row += bits
    stored = {
        "q_weight": torch.zeros(row, 256, dtype=torch.int32),
        "q_scale": torch.zeros(8, 32, dtype=torch.int32),
        "q_scale_max": torch.ones(8, dtype=torch.float16),
        "q_groups": torch.tensor(pairs, dtype=torch.int16),
        "q_invperm": torch.arange(256, dtype=torch.int32),
    }
    tensors = {f"{key}.{suffix}": tensor for suffix, tensor in stored.items()}
    save_file({**tensors, "model.norm.weight": torch.ones(256).half()}, folder / "output.safetensors")
    return folder


def test_a_model_is_as_safetensors_reads_it(tiny_llama: Path) -> None:
    found = inspect(tiny_llama)
    file: Any = safe_open(tiny_llama / "model.safetensors", framework="pt")
    assert {entry.name for entry in found.entries} == set(file.keys())
    for entry in found.entries:
        tensor = file.get_tensor(entry.name)
        assert (entry.shape, entry.type) == (tuple(tensor.shape), "BF16")
        assert (entry.weights, entry.n_bytes, entry.bits) == (tensor.numel(), tensor.nbytes, 16)
    assert (found.kind, found.facts["family"], found.facts["becomes"]) == ("model", "llama", "exl2, gguf")
    assert found.facts["parameters"] == 4_196_608
    assert found.notes == ()


def test_a_model_without_weights_has_the_same_parameters(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    found = inspect(tmp_path)
    assert found.facts["parameters"] == 4_196_608
    assert found.entries == ()
    assert "no weights" in found.notes[0]


def test_a_family_that_is_not_supported_is_said_so(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    shutil.copy(tiny_llama / "model.safetensors", tmp_path)
    found = inspect(tmp_path)
    assert "MambaForCausalLM is not supported" in found.facts["family"]
    assert found.facts["parameters"] == 4_196_608
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 512}))
    assert "config.json describes" in inspect(tmp_path).notes[0]


def test_a_gguf_file_is_as_the_gguf_package_reads_it(gguf_file: Path) -> None:
    found = inspect(gguf_file)
    known = {tensor.name: tensor for tensor in GGUFReader(gguf_file).tensors}
    assert [entry.name for entry in found.entries] == list(known)
    for entry in found.entries:
        tensor = known[entry.name]
        assert (entry.type, entry.shape) == (tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1]))
        assert (entry.weights, entry.n_bytes) == (tensor.n_elements, tensor.n_bytes)
    assert found.facts["bytes"] == gguf_file.stat().st_size
    assert {total.type: total.entries for total in found.totals} == {"Q8_0": 2, "Q4_0": 2, "F32": 2}
    assert next(entry.bits for entry in found.entries if entry.type == "Q4_0") == 4.5
    tokens = found.metadata["tokenizer.ggml.tokens"]
    assert tokens.startswith("token 0, token 1")
    assert tokens.endswith("(1,000 in all)")


def test_a_split_gguf_file_is_one(gguf_file: Path, tmp_path: Path) -> None:
    whole = inspect(gguf_file)
    names = [entry.name for entry in whole.entries]
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf_file).tensors}
    for number in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"s-{number + 1:05d}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[number::2]:
            writer.add_tensor(name, tensors[name].data, raw_dtype=tensors[name].tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    found = inspect(tmp_path / "s-00001-of-00002.gguf")
    assert sorted(found.entries, key=lambda e: e.name) == sorted(whole.entries, key=lambda e: e.name)
    assert found.facts["files"] == 2
    with pytest.raises(InputError, match="give the first"):
        inspect(tmp_path / "s-00002-of-00002.gguf")
    (tmp_path / "s-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        inspect(tmp_path / "s-00001-of-00002.gguf")


def test_an_exl2_linear_has_the_bits_the_format_stores(tiny_llama: Path, tmp_path: Path) -> None:
    directory = exl2_directory(tmp_path / "exl2", tiny_llama)
    found = inspect(directory)
    linear, norm = found.entries
    with safe_open(directory / "output.safetensors", framework="pt") as file:
        tensors = {suffix: file.get_tensor(f"{linear.name}.{suffix}") for suffix in exl2.SUFFIXES}
    groups = exl2.stored_groups(tensors)
    assert linear.bits == exl2.storage_bits(groups, 256) / 256**2
    assert linear.n_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (linear.type, linear.shape) == ("0.25:4b/0.75:3b 32g", (256, 256))
    assert (norm.name, norm.type, norm.bits) == ("model.norm.weight", "F16", 16)
    assert found.facts["bits per weight"] == pytest.approx(linear.bits, abs=1e-4)


def test_figures_come_from_the_measurement_beside_if_it_is_of_this_model(
    tiny_llama: Path, tmp_path: Path
) -> None:
    key = "model.layers.0.self_attn.q_proj"
    directory = exl2_directory(tmp_path / "exl2", tiny_llama, key)
    shutil.copy(MEASUREMENT, tmp_path / "measurement.json")
    bits = 8 * (inspect(directory).entries[0].n_bytes or 0)
    record = next(linear for linear in load(MEASUREMENT).linears if linear.key == key)
    option = next(option for option in record.options if option.total_bits == bits)
    summary = {"outputs": {"exl2": {"allocation": {key: option.desc}}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    linear = inspect(directory).entries[0]
    assert (linear.type, linear.error, linear.loss) == (option.desc, option.err, option.loss)
    assert linear.sensitivity == record.sensitivity
    summary["outputs"]["exl2"]["allocation"][key] = record.options[0].desc
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    other = inspect(directory)
    assert other.entries[0].error is None
    assert "another model" in other.notes[0]


def test_figures_of_a_gguf_file_come_from_its_job(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj"
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf" / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    packed = np.zeros((256, 144), np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert inspect(path).entries[0].error is None
    shutil.copy(MEASUREMENT, tmp_path / "measurement.json")
    record = next(linear for linear in load(MEASUREMENT).linears if linear.key == key)
    option = next(option for option in record.options if option.desc == "Q4_K")
    for chosen, error in (("Q4_K", option.err), ("Q5_K", None)):
        summary = {"outputs": {"gguf": {"allocation": {key: chosen}}}}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert inspect(path).entries[0].error == error


def test_a_finished_job_is_told_by_its_figures(tmp_path: Path) -> None:
    figures = {"kl_mean": 0.0016, "perplexity": 52.1, "perplexity_base": 52.0, "top1_agreement": 0.97}
    made = {
        "bpw": 4.5,
        "bytes": 3_000_000,
        "predicted_kl": None,
        "evaluation": figures,
        "paths": ["out/exl2"],
    }
    summary = {
        "command": "exlq convert",
        "target": {"-b": 4.5},
        "outputs": {"exl2": made},
        "notes": ["a note"],
        "calibration": {"file": "text.parquet", "rows": 400, "row_length": 512},
        "seconds": {"measuring": 29.0},
        "settings": {"seed": 0},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = inspect(tmp_path)
    assert found.kind == "job"
    assert found.facts["exl2: bits per weight"] == 4.5
    assert found.facts["base: perplexity"] == 52.0
    assert found.notes == ("a note", "see exlq inspect out/exl2")
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "seconds": None}))
    with pytest.raises(InputError, match="is broken"):
        inspect(tmp_path)


def test_a_measurement_is_told_by_linear_and_format() -> None:
    record, found = load(MEASUREMENT), inspect(MEASUREMENT)
    assert len(found.entries) == 2 * len(record.linears)
    for entry in found.entries:
        linear = next(linear for linear in record.linears if linear.key == entry.name)
        options = [option for option in linear.options if option.format == entry.type]
        assert entry.ways is not None
        assert entry.ways.options == len(options)
        assert entry.ways.least_bits == options[0].bpw
        for bits, error in entry.ways.errors.items():
            nearest = min(abs(option.bpw - bits) for option in options)
            assert any(abs(o.bpw - bits) == nearest <= 0.5 and o.err == error for o in options)
    assert set(found.entries[0].ways.errors if found.entries[0].ways else ()) == {3, 4, 5}


def test_a_job_is_told_by_its_stage(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "job.json").write_text('{"format": "exlq-job", "version": 1}')
    assert inspect(tmp_path).facts["stage"] == "begun, no linear is measured yet"
    shutil.copy(MEASUREMENT, tmp_path / "work" / "measurement.partial.json")
    assert inspect(tmp_path).facts["stage"] == "measuring, 30 linears done"
    shutil.copy(MEASUREMENT, tmp_path / "measurement.json")
    (tmp_path / "work" / "exl2").mkdir()
    assert inspect(tmp_path).facts["stage"] == "measured (30 linears); writing exl2"
    (tmp_path / "summary.json").write_text('{"outputs": {}')
    with pytest.raises(InputError, match=r"summary.json is broken"):
        inspect(tmp_path)


def test_entries_are_chosen_and_sorted() -> None:
    entries = (
        Entry("layers.10.q", "Q4_K", (2, 2), 4, 4.5, 20, error=0.2),
        Entry("layers.9.q", "Q6_K", (2, 2), 4, 6.5, 30, error=0.1),
        Entry("layers.9.norm", "F32", (2,), 2, 32.0, 8),
    )
    found = Inspection("x", "gguf", {}, entries)

    def names(**choice: str) -> list[str]:
        return [entry.name for entry in select(found, **choice).entries]

    assert names(order="name") == ["layers.9.norm", "layers.9.q", "layers.10.q"]
    assert names(order="error") == ["layers.10.q", "layers.9.q", "layers.9.norm"]
    assert names(order="bits") == ["layers.9.norm", "layers.9.q", "layers.10.q"]
    assert names(order="bytes") == ["layers.9.q", "layers.10.q", "layers.9.norm"]
    assert names(pattern=r"\.q$", kind="q6_k") == ["layers.9.q"]
    for choice in ({"pattern": "("}, {"pattern": "x"}, {"kind": "Q9"}):
        with pytest.raises(ConfigError):
            names(**choice)
    assert set(SORTS) == set(ORDERS)
    assert natural("a2b") < natural("a10b")


def test_the_grid_holds_every_matrix_of_a_layer(gguf_file: Path, tiny_llama: Path) -> None:
    grid = by_layer(inspect(gguf_file))
    assert grid.kinds == ("attn_q", "ffn_down")
    assert grid.values == {0: {"attn_q": 4.5, "ffn_down": 8.5}, 1: {"attn_q": 4.5, "ffn_down": 8.5}}
    assert len(by_layer(inspect(tiny_llama)).kinds) == 7
    assert set(by_layer(inspect(MEASUREMENT)).values) == {0, 1, 2, 3}
    with pytest.raises(ConfigError):
        by_layer(Inspection("x", "gguf", {}))


def header(tree: object) -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut short": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"\0",
    "a lying length": lambda whole: (1 << 60).to_bytes(8, "little") + whole[8:],
    "no JSON": lambda whole: header(b"{nothing"),
    "NaN": lambda whole: header(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 0]}}'),
    "no object": lambda whole: header([1]),
    "nested": lambda whole: header(b"[" * 100_000),
    "a name twice": lambda whole: header(b'{"a": {}, "a": {}}'),
    "a negative shape": lambda whole: header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
    "a lying shape": lambda whole: (
        header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}) + b"1234"
    ),
    "a hole": lambda whole: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + bytes(8),
    "an overlap": lambda whole: (
        header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}) + bytes(8)
    ),
    "bytes before": lambda whole: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_safetensors_file_is_one_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, path)
    path.write_bytes(BROKEN[fault](path.read_bytes()))
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "model.safetensors is not a whole safetensors file" in error


@pytest.mark.parametrize("size", [0, 3, 20, 200, -1])
def test_a_gguf_file_cut_short_is_one_line(
    size: int, gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:size])
    assert main(["inspect", str(gguf_file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_exl2_groups_that_do_not_fit_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = exl2_directory(tmp_path / "exl2", tiny_llama)
    path = directory / "output.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    groups = "model.layers.0.self_attn.q_proj.q_groups"
    for pairs in ([4, 0, 7, 4], [4, 0, 3, -1], [4, 0], [4, 0, 3]):
        save_file({**tensors, groups: torch.tensor(pairs, dtype=torch.int16)}, path)
        with pytest.raises(InputError, match="q_groups"):
            inspect(directory)
    del tensors[groups]
    save_file(tensors, path)
    with pytest.raises(InputError, match="q_groups is missing"):
        inspect(directory)


def test_what_is_none_of_these_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "other.json").write_text('{"err": NaN}')
    for path in (tmp_path, tmp_path / "note.txt", tmp_path / "other.json", tmp_path / "nothing"):
        assert main(["inspect", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_prints_tables_and_json(gguf_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(gguf_file), "--metadata", "--sort", "bits"]) == 0
    shown = capsys.readouterr().out
    assert "blk.1.ffn_down.weight" in shown
    assert "tokenizer.ggml.tokens" in shown
    assert main(["inspect", str(gguf_file), "--json", "--metadata", "--by-layer", "--filter", "ffn"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [entry["name"] for entry in found["entries"]] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert found["by_layer"]["values"] == {"0": {"ffn_down": 8.5}, "1": {"ffn_down": 8.5}}
    assert found["metadata"]["made.not_a_number"] == "nan"


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"evil\x1b[2J[red]": torch.ones(1)}, path)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "evil\\x1b[2J[red]" in shown


def test_looking_loads_no_torch(tiny_llama: Path, tmp_path: Path, gguf_file: Path) -> None:
    directory = exl2_directory(tmp_path / "exl2", tiny_llama)
    paths = [str(path) for path in (tiny_llama, directory, gguf_file, MEASUREMENT)]
    code = (
        f"import sys; from exlq.cli import main\nfor p in {paths!r}: assert main(['inspect', '-q', p]) == 0\n"
        "print([n for n in ('torch', 'transformers', 'pyarrow') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
