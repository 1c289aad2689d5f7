from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from exlq.errors import ModelError
from exlq.formats.gguf import imatrix
from exlq.formats.gguf.imatrix import Entry, Imatrix

DENSE, EXPERTS = "blk.0.ffn_down.weight", "blk.0.ffn_down_exps.weight"


def squares(*shape: int) -> Tensor:
    return 100 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).square()


def example(*datasets: str) -> Imatrix:
    """Two weights seen by 1000 tokens in chunks of 300, one with three experts of which one saw none."""
    sums = squares(3, 16)
    sums[1] = 0
    entries = {
        EXPERTS: Entry(sums, torch.tensor([700.0, 0.0, 300.0])),
        DENSE: Entry(squares(1, 24), torch.tensor([1000.0])),
    }
    return Imatrix(entries, datasets, chunk_count=4, chunk_size=300)


def parse_dat(data: bytes) -> tuple[dict[str, tuple[int, tuple[float, ...]]], int, str]:
    """Name -> (calls, values), chunks and dataset, as llama.cpp's loader walks through the file."""
    place = 0

    def integer() -> int:
        nonlocal place
        place += 4
        return int(struct.unpack_from("<i", data, place - 4)[0])

    def text() -> str:
        nonlocal place
        n_bytes = integer()
        place += n_bytes
        return data[place - n_bytes : place].decode()

    entries = {}
    for _ in range(integer()):
        name, calls, n_values = text(), integer(), integer()
        entries[name] = (calls, struct.unpack_from(f"<{n_values}f", data, place))
        place += 4 * n_values
    chunks, dataset = integer(), text()
    assert place == len(data)
    return entries, chunks, dataset


def dat(*entries: tuple[bytes, int, list[float]], tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts += [struct.pack("<i", len(name)), name, struct.pack("<ii", calls, len(values))]
        parts.append(struct.pack(f"<{len(values)}f", *values))
    return b"".join([*parts, tail])


def test_the_gguf_package_reads_what_we_save(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    imatrix.save(example("wiki", "code"), path)

    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == [f"{name}.{part}" for name in (DENSE, EXPERTS) for part in ("in_sum2", "counts")]
    for name, entry in example().entries.items():
        assert found[f"{name}.in_sum2"].tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(found[f"{name}.in_sum2"].data, entry.sums.numpy())
        np.testing.assert_array_equal(found[f"{name}.counts"].data, entry.counts[:, None].numpy())
        assert found[f"{name}.counts"].shape.tolist() == [1, len(entry.counts)]
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["wiki", "code"]
    for key, value in {"imatrix.chunk_count": 4, "imatrix.chunk_size": 300}.items():
        assert reader.fields[key].contents() == value
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
    assert list(tmp_path.iterdir()) == [path]


def test_the_gguf_form_comes_back_as_it_was(tmp_path: Path) -> None:
    imatrix.save(example("wiki", "code"), tmp_path / "imatrix.gguf")
    found = imatrix.load(tmp_path / "imatrix.gguf")
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("wiki", "code"), 4, 300)
    for name, entry in example().entries.items():
        assert torch.equal(found.entries[name].sums, entry.sums)
        assert torch.equal(found.entries[name].counts, entry.counts)


def test_no_dataset_is_saved_as_a_list_that_llama_quantize_finds(tmp_path: Path) -> None:
    imatrix.save(example(), tmp_path / "imatrix.gguf")
    assert "imatrix.datasets" in gguf.GGUFReader(tmp_path / "imatrix.gguf").fields
    assert imatrix.load(tmp_path / "imatrix.gguf").datasets == ()


def test_the_legacy_form_holds_means_times_the_number_of_chunks(tmp_path: Path) -> None:
    imatrix.save(example("wiki", "code"), tmp_path / "imatrix.DAT")

    entries, chunks, dataset = parse_dat((tmp_path / "imatrix.DAT").read_bytes())

    assert (list(entries), chunks, dataset) == ([DENSE, EXPERTS], 4, "code")
    assert [calls for calls, _ in entries.values()] == [4, 3]  # of 300 tokens for 1000, for 700
    for name, (calls, values) in entries.items():
        mean = example().importance(name)
        assert mean is not None
        torch.testing.assert_close(torch.tensor(values) / calls, mean.flatten())


def test_the_legacy_form_comes_back_as_it_was(tmp_path: Path) -> None:
    first, second = tmp_path / "first.dat", tmp_path / "second.dat"
    imatrix.save(example("wiki", "code"), first)
    imatrix.save(imatrix.load(first), second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_importance_is_the_mean_of_each_expert_and_one_where_no_token_came(
    tmp_path: Path, suffix: str
) -> None:
    imatrix.save(example(), tmp_path / f"imatrix.{suffix}")
    found = imatrix.load(tmp_path / f"imatrix.{suffix}")

    dense, experts = found.importance_for(DENSE, (8, 24)), found.importance_for(EXPERTS, (3, 8, 16))

    assert dense is not None
    assert experts is not None
    torch.testing.assert_close(dense, example().entries[DENSE].sums[0] / 1000)
    torch.testing.assert_close(experts[2], example().entries[EXPERTS].sums[2] / 300)
    assert torch.equal(experts[1], torch.ones(16))


def test_a_weight_without_an_entry_has_no_importance() -> None:
    assert example().importance("blk.7.attn_q.weight") is None
    assert example().importance_for("blk.7.attn_q.weight", (8, 24)) is None


def test_an_entry_of_other_inputs_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=rf"\(24,\) values for {DENSE}, want \(32,\)"):
        example().importance_for(DENSE, (8, 32))


def test_legacy_files_without_a_tail_or_without_calls_are_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(dat((b"a", 2, [2.0, 6.0]), (b"b", 0, [3.0])))
    found = imatrix.load(path)
    assert [found.importance(name).tolist() for name in "ab"] == [[1.0, 3.0], [3.0]]  # type: ignore[union-attr]
    assert (found.datasets, found.chunk_count) == ((), 0)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "4 bytes are announced at byte 0, 0 are left"),
        (struct.pack("<i", 0), "0 entries"),
        (struct.pack("<i", 2**31 - 1), "4 bytes are announced"),
        (struct.pack("<ii", 1, 2**31 - 1), "2147483647 bytes are announced at byte 8, 0 are left"),
        (struct.pack("<ii", 1, -1), "-1 bytes are announced"),
        (
            struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1),
            "8589934588 bytes are announced",
        ),
        (dat((b"a", 1, [])), "0 values"),
        (dat((b"a", 1, [1.0]), (b"a", 1, [1.0])), "'a' has two entries"),
        (dat((b"\xff", 1, [1.0])), "not UTF-8"),
        (dat((b"a", 1, [1.0]), tail=struct.pack("<ii", 1, 9)), "9 bytes are announced"),
        (dat((b"a", 1, [1.0, float("nan")])), "a has 1 of 2 sums"),
        (dat((b"a", 1, [float("inf"), -1.0])), "a has 2 of 2 sums"),
    ],
)
def test_a_broken_legacy_file_is_refused_with_one_line(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "imatrix.dat").write_bytes(data)
    with pytest.raises(ModelError, match=complaint) as caught:
        imatrix.load(tmp_path / "imatrix.dat")
    assert str(tmp_path / "imatrix.dat") in str(caught.value)
    assert "\n" not in str(caught.value)


def save_with_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A file by the gguf package's writer, with no metadata of an importance matrix."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ONES = np.ones((1, 4), np.float32)


def test_a_file_of_the_gguf_package_is_read_and_other_tensors_are_passed_over(tmp_path: Path) -> None:
    tensors = {"a.in_sum2": 6 * ONES, "a.counts": 2.2 * ONES[:, :1], "output.weight": ONES.astype(np.float16)}
    save_with_gguf(tmp_path / "imatrix.gguf", tensors)
    found = imatrix.load(tmp_path / "imatrix.gguf")
    assert list(found.entries) == ["a"]
    assert found.importance("a").tolist() == [3.0] * 4  # type: ignore[union-attr]  # counts are whole
    assert (found.datasets, found.chunk_count, found.chunk_size) == ((), 0, 0)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"output.weight": ONES}, "no entry"),
        ({"a.in_sum2": ONES}, "a has 4 sums and 0 counts"),
        ({"a.counts": ONES}, "a has 0 sums and 4 counts"),
        ({"a.in_sum2": ONES, "a.counts": np.ones((3, 1), np.float32)}, "a has 4 sums and 3 counts"),
        ({"a.in_sum2": ONES.astype(np.float16), "a.counts": ONES}, "a.in_sum2 is of type F16"),
        ({"a.in_sum2": ONES * np.float32("nan"), "a.counts": ONES}, "a has 4 of 4 sums"),
        ({"a.in_sum2": ONES, "a.counts": -ONES}, "a has 4 of 4 counts"),
    ],
)
def test_a_gguf_file_that_is_none_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], complaint: str
) -> None:
    save_with_gguf(tmp_path / "imatrix.gguf", tensors)
    with pytest.raises(ModelError, match=complaint):
        imatrix.load(tmp_path / "imatrix.gguf")


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_a_file_cut_or_bent_anywhere_is_refused_or_read_but_never_crashes(
    tmp_path: Path, suffix: str
) -> None:
    whole, broken = tmp_path / f"whole.{suffix}", tmp_path / f"broken.{suffix}"
    imatrix.save(example(), whole)
    data = whole.read_bytes()
    # without the last word, the padding or the name of the dataset, a file may still be whole
    variants = [data[:cut] for cut in range(0, len(data) - 64, 7)]
    variants += [data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :] for at in range(0, len(data) - 4, 5)]
    complaints = []
    for variant in variants:
        broken.write_bytes(variant)
        try:
            imatrix.load(broken)
        except ModelError as exc:
            complaints.append(str(exc))
    assert not [complaint for complaint in complaints if "\n" in complaint]
    refused = len(complaints)
    assert refused > len(variants) // 2, f"{refused} of {len(variants)} were refused"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        imatrix.load(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (Entry(torch.ones(1, 4) * torch.nan, torch.ones(1)), "x has 4 of 4 sums"),
        (Entry(torch.ones(2, 4), torch.ones(1)), "x has sums of shape"),
        (Entry(torch.ones(4), torch.ones(1)), "x has sums of shape"),
        (Entry(torch.ones(1, 4).double(), torch.ones(1)), "torch.float64"),
    ],
)
def test_an_entry_that_no_file_may_hold_cannot_be_made(entry: Entry, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        Imatrix({"x": entry})


def test_a_name_ggml_would_cut_is_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    long = Imatrix({"x" * 60: Entry(torch.ones(1, 4), torch.ones(1))})
    with pytest.raises(ModelError, match="63 bytes"):
        imatrix.save(long, tmp_path / "imatrix.gguf")
    assert not list(tmp_path.iterdir())
