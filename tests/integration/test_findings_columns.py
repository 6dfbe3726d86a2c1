"""gxr_findings_kept and gxr_findings_lost: what a run writes there, and where its users see it."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_server import Act, FaultServer, completion
from running import Workplace

from gxr_batch import read_results

KEPT, LOST = "gxr_findings_kept", "gxr_findings_lost"
FINDINGS = "Small right pleural effusion. Surgical clips. The heart is enlarged."
TEXTS = {
    "some": "There is a small effusion on the right. Note the clips.",
    "all": "Right effusion, clips and an enlarged heart.",
    "refused": "I am an AI and cannot help with that.",
    "held": "There is a small effusion. Call Dr. Anna Berger, phone 030 1234567.",
    "failed": "",
    "normal": "The lungs are clear.",
}
EXPECTED = {
    "some": (["pleural effusion", "surgical clips"], ["cardiomegaly"]),
    "all": (["pleural effusion", "surgical clips", "cardiomegaly"], []),
    "refused": (None, None),
    "held": (None, None),
    "failed": (None, None),
    "normal": ([], []),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workplace:
    """A finished run whose texts are those of TEXTS."""
    work = Workplace(tmp_path_factory.mktemp("work"))
    rows = [(name, f"{'Clear lungs.' if name == 'normal' else FINDINGS} Film {name}.") for name in TEXTS]
    work.table(rows)

    def behave(body: dict, _: int) -> Act | None:
        asked = body["messages"][-1]["content"]
        return next((Act(body=completion(text)) for name, text in TEXTS.items() if f"Film {name}" in asked), None)

    with FaultServer(behave) as server:
        work.job(
            f"[engine]\nkind = 'api'\n[run]\nmax_failed = 'off'\n[privacy]\nidentifiers = 'hold'\n"
            f"[api]\nmodel = 'm'\nbase_url = '{server.url}'\n"
        )
        work.run(expect=3)
    return work


def test_a_run_writes_which_findings_its_texts_name(work):
    rows = {row["gxr_row_id"]: row for row in work.results()}
    assert {name: (row[KEPT], row[LOST]) for name, row in rows.items()} == EXPECTED
    assert {name: row["gxr_status"] for name, row in rows.items() if name in {"held", "failed"}} == {
        "held": "held",
        "failed": "failed",
    }
    assert "finding_lost" in rows["some"]["gxr_flags"]
    assert [pq.read_schema(part).field(LOST).type for part in work.parts()] == [pa.list_(pa.string())]
    frame = read_results(work.folder / "outputs/j").set_index("gxr_row_id")
    assert list(frame.loc["some", LOST]) == ["cardiomegaly"]


def test_pipelines_get_lists(work):
    for form in ("jsonl", "parquet", "csv", "csv-plain"):
        work.gxr("export", "outputs/j", "--format", form, "--to", f"made.{form}")
    lines = [json.loads(line) for line in (work.folder / "made.jsonl").read_text().splitlines()]
    assert {line["gxr_row_id"]: (line[KEPT], line[LOST]) for line in lines} == EXPECTED
    table = pq.read_table(work.folder / "made.parquet")
    assert table[KEPT].to_pylist() == [kept for kept, _ in EXPECTED.values()]
    for form in ("csv", "csv-plain"):
        with (work.folder / f"made.{form}").open(newline="", encoding="utf-8-sig") as file:
            cells = {row["gxr_row_id"]: row[LOST] for row in csv.DictReader(file)}
        assert cells == {**dict.fromkeys(TEXTS, ""), "some": '["cardiomegaly"]'}


def test_the_workbook_has_them_in_words_after_the_flags(work):
    work.gxr("export", "outputs/j")
    sheet = openpyxl.load_workbook(work.folder / "outputs/j/results.xlsx")["Cases"]
    captions, names, *rows = sheet.iter_rows(min_row=2, values_only=True)
    at = names.index("gxr_flags")
    assert names[at + 1 : at + 3] == (KEPT, LOST)
    assert captions[at + 1 : at + 3] == ("Findings that the text names", "Findings that it does not name, or denies")
    shown = {row[0]: row[at + 1 : at + 3] for row in rows}
    assert shown["some"] == ("pleural effusion, surgical clips", "cardiomegaly")
    assert shown["all"] == ("pleural effusion, surgical clips, cardiomegaly", None)
    assert shown["refused"] == (None, None)
    work.gxr("review", "import", "outputs/j", "outputs/j/results.xlsx")


def test_show_and_the_report_name_what_is_lost(work):
    assert "Not named in the text, or denied: cardiomegaly\n" in work.gxr("show", "outputs/j", "--row", "some").stdout
    assert "Not named" not in work.gxr("show", "outputs/j", "--row", "all").stdout
    work.gxr("report", "outputs/j")
    page = (work.folder / "outputs/j/report.html").read_text(encoding="utf-8")
    block = re.search(r'<script type="text/plain" id="packed-cases">(.*?)</script>', page, re.DOTALL)
    packed = json.loads(gzip.decompress(base64.b64decode(block[1])))
    columns = {column["name"]: column for column in packed["columns"]}
    assert (columns[LOST]["kind"], columns[LOST]["values"]) == ("list", [lost for _, lost in EXPECTED.values()])


def test_a_job_that_reads_the_run_has_them_as_fields(work):
    (work.folder / "t.md.j2").write_text("Add to {{ source_text }} what it lacks: {{ source_findings_lost }}")
    (work.folder / "second.toml").write_text(
        "name = 'second'\n[input]\npath = 'outputs/j'\nonly = 'ok'\n[prompt]\ntemplate = 't.md.j2'\n"
        "[engine]\nkind = 'echo'\n"
    )
    work.gxr("run", "second.toml", expect=None)
    rows = {row["case_id"]: row for row in work.results("outputs/second")}
    assert rows["some"]["source_findings_lost"] == ["cardiomegaly"]
    assert "what it lacks: cardiomegaly" in rows["some"]["gxr_text"]
    assert (rows["some"][KEPT], rows["some"][LOST]) == (None, None), "this template has no field findings"
