"""The report's page: one file, nothing fetched, figures as they are, names that stay text."""

from __future__ import annotations

import errno
import html
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exlq.doctor import diagnose
from exlq.errors import InputError
from exlq.report.page import embedded, write_report
from tests.report.page_helpers import lone_measurement, make_job, renamed

HOSTILE = "</script><img src=x onerror=alert(1)>"


class Read(HTMLParser):
    """Tags, attributes and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.text = ""
        self._script: str | None = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            kind = self.tags[-1][1].get("id")
            self.scripts[kind] = self.scripts.get(kind, "") + data
        elif self._inside != "style":
            self.text += data


def read(path: Path) -> Read:
    return Read(path.read_text(encoding="utf-8"))


def data_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read(path).scripts["data"])
    return found


def test_the_page_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job")
    before = set(job.iterdir())
    written = write_report(job)
    assert set(job.iterdir()) - before == {job / "report.html"} == {written}
    text = written.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|//[a-z]+\.[a-z]", text)
    for tag, attributes in Read(text).tags:
        assert tag not in {"link", "img", "iframe", "object", "embed"}
        assert not {"src", "href", "srcset"} & set(attributes), tag
    assert "default-src 'none'" in text


def test_the_embedded_data_are_the_figures_of_the_job(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job")
    summary = json.loads((job / "summary.json").read_text(encoding="utf-8"))
    data = data_of(write_report(job))
    assert data["name"] == "tiny-llama"
    assert [each["name"] for each in data["formats"]] == ["exl2", "gguf"]
    for name, made in summary["outputs"].items():
        found = data["results"][name]
        assert found["evaluation"] == made["evaluation"]
        assert found["allocation"] == made["allocation"]
        for key, known in (("bpw", "bpw"), ("bytes", "n_bytes"), ("predicted_kl", "predicted_kl")):
            assert found[known] == made[key]


def test_what_a_person_reads_without_javascript_holds_the_result(tmp_path: Path) -> None:
    shown = read(write_report(make_job(tmp_path / "job"))).text
    for figure in (
        "4.499",
        "3.12 MiB",
        "0.00160",
        "0.00110 ± 0.00050",
        "52.070",
        "52.020",
        "96.8 %",
        "a note",
    ):
        assert figure in shown
    assert "857,603" in shown
    assert "exlq convert -i models/tiny-llama -o out -b 4.5" in shown


@pytest.mark.parametrize("old", ["model.layers.0.self_attn.q_proj", "models/tiny-llama", "a note"])
def test_hostile_names_stay_text(old: str, tmp_path: Path) -> None:
    clean = [tag for tag, _ in read(write_report(make_job(tmp_path / "clean"))).tags]
    written = write_report(renamed(make_job(tmp_path / "job"), old, f"a.0.{HOSTILE}"))
    found = read(written)
    assert [tag for tag, _ in found.tags] == clean
    assert "<img" not in html.unescape(
        written.read_text(encoding="utf-8").split("<body>")[0].split("<title>")[0]
    )
    assert HOSTILE in found.text + json.dumps(json.loads(found.scripts["data"]))


def test_embedded_json_holds_nothing_that_ends_a_script() -> None:
    value = {"a": "</script><!--\u2028", "b": [1.5, None]}
    text = embedded(value)
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == value


def test_a_measurement_alone_gives_a_page_with_a_mix(tmp_path: Path) -> None:
    written = write_report(lone_measurement(tmp_path))
    assert written == tmp_path / "measurement.html"
    data = data_of(written)
    assert data["results"] == {}
    for each in data["formats"]:
        assert 4.4 < each["preview_bpw"] <= 4.5
        assert each["frontier"]
        assert each["chosen"] is None
    assert "No model was made" in read(written).text


def test_only_formats_that_were_made_are_shown(tmp_path: Path) -> None:
    data = data_of(write_report(make_job(tmp_path / "job", ("gguf",))))
    assert [each["name"] for each in data["formats"]] == ["gguf"]


def test_a_job_that_measured_nothing_shows_its_result(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", ("gguf",))
    (job / "measurement.json").unlink()
    (found,) = data_of(write_report(job))["formats"]
    assert found["frontier"] == []
    assert found["measured"][2] == 0.0016
    assert {linear["chosen"] for linear in found["linears"]} == {None}
    assert all(linear["desc"] for linear in found["linears"])


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (None, "does not exist"),
        ({}, "has no summary.json, so it is no finished job"),
        ({"summary.json": "{"}, "is broken"),
        ({"summary.json": "[]"}, "is broken"),
        ({"summary.json": '{"settings": {"in_dir": "m"}, "target": {}}'}, "lacks 'outputs'"),
        (
            {"summary.json": '{"settings": {"in_dir": "m"}, "target": {}, "outputs": {"exl2": 3}}'},
            "is broken",
        ),
        ({"summary.json": "{}", "measurement.json": "{}"}, "format is None"),
    ],
)
def test_what_cannot_be_reported_on_is_refused_in_one_line(
    files: dict[str, str] | None, told: str, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    if files is not None:
        job.mkdir()
        for name, text in files.items():
            (job / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        write_report(job, tmp_path / "page.html")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_put_there_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job")
    for target in (tmp_path, tmp_path / "missing" / "page.html"):
        with pytest.raises(InputError, match="-o "):
            write_report(job, target)


def test_a_failed_write_leaves_the_earlier_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path / "job")
    written = write_report(job)
    earlier = written.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("exlq.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(job)
    assert written.read_bytes() == earlier
    assert {path.name for path in job.iterdir()} == {"summary.json", "measurement.json", "report.html"}


def test_the_calibration_text_is_told_as_the_doctor_finds_it(tmp_path: Path, tiny_llama: Path) -> None:
    job = make_job(tmp_path / "job")
    text = tmp_path / "text.parquet"
    cells = ["The same words are here twice, and that is one time too many."] * 2
    pq.write_table(pa.table({"text": [*cells, "def f(x):\n    return x\n" * 20]}), text)
    summary = json.loads((job / "summary.json").read_text(encoding="utf-8"))
    assert "texts that repeat others" not in read(write_report(job)).text
    summary["calibration_text"] = asdict(diagnose(text))
    (job / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    shown = read(write_report(job)).text
    assert "texts that repeat others1 to the letter, 0 nearly" in shown
    assert "rows of the file3" in shown
    assert f"code, roughly{100 * diagnose(text).code:.1f} %" in shown
    for advice in diagnose(text).advice:
        assert advice.text in shown
