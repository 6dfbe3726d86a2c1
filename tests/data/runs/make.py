"""Makes the fixtures of one version: run folders as it leaves them, which every later version must go on with.

`python tests/data/runs/make.py NAME` writes seven folders below tests/data/runs/NAME with the gxr-batch that this
Python imports. A change of a column, a key or a file of a run adds a set, made by the last commit before it; no set
is ever made again or taken away. Every folder holds the job file, the table and `outputs/j`, the run:

- finished     two samples a row, reviewed by two people, exported as workbook and CSV
- unfinished   killed by SIGKILL in the middle
- retried      failed, held, released and retried rows
- grown        finished; its table then grew by 100 rows
- formed       finished, with a form, and reviewed by section; its table then grew (from format 6 on)
- named        the same with a built-in form, without reviews (from format 6 on)
- joined       finished, with a template that joins cells, some of them missing; its table then grew
"""

from __future__ import annotations

import csv
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAD = "name = 'j'\n[input]\npath = 'f.csv'\nid_column = 'case_id'\n[engine]\nkind = 'echo'\n"
FINDINGS = (
    "Clear lungs. No pleural effusion.",
    "Small left pleural effusion with basal atelectasis.",
    "Right upper lobe consolidation, 3 cm.",
    "Mild cardiomegaly. No pneumothorax.",
)


def gxr(folder: Path, *arguments: str, expect: int = 0) -> None:
    """Run the command in a folder and insist on its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "gxr_batch", *arguments], cwd=folder, text=True, capture_output=True, check=False
    )
    if done.returncode != expect:
        sys.exit(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")


def write_table(folder: Path, rows: list[tuple[str, str]]) -> None:
    """Write the table of a job."""
    with (folder / "f.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("case_id", "findings"), *rows])


def cases(count: int) -> list[tuple[str, str]]:
    """Return so many rows, the first of them the same whatever their number."""
    return [(f"C{number:03}", f"{FINDINGS[number % 4]} Case number {number}.") for number in range(count)]


def finished(folder: Path) -> None:
    """Two samples a row, two reviewers, exports."""
    (folder / "j.toml").write_text(HEAD + "[sampling]\nsamples_per_row = 2\n")
    write_table(folder, cases(24))
    gxr(folder, "run", "j.toml")
    gxr(folder, "export", "outputs/j", "--format", "csv", "--to", "sheet.csv")
    review(folder, "Ada", {"approved": range(10), "rejected": range(10, 14)})
    review(folder, "Ben", {"approved": range(20, 24), "approved_with_edits": range(12, 16)})
    (folder / "sheet.csv").unlink()
    gxr(folder, "export", "outputs/j", "--format", "xlsx")
    gxr(folder, "export", "outputs/j", "--format", "csv")


def review(folder: Path, reviewer: str, verdicts: dict[str, range]) -> None:
    """Fill in the exported sheet as a reviewer would and import it."""
    with (folder / "sheet.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for status, which in verdicts.items():
        for number in which:
            row = rows[number]
            row |= {"gxr_review_status": status, "gxr_reviewer": reviewer, "gxr_reviewed_at": "2026-11-28"}
            row["gxr_review_quality"] = "4" if status == "approved" else ""
            row["gxr_review_text"] = "A corrected text." if status == "approved_with_edits" else ""
    sheet = folder / f"sheet-{reviewer}.csv"
    with sheet.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    gxr(folder, "review", "import", "outputs/j", sheet.name)
    sheet.unlink()


def unfinished(folder: Path) -> None:
    """Killed once a few parts are sealed."""
    speed = "slots = 4\n[echo]\ntokens_per_second = 40\n[run]\ncheckpoint_seconds = 0.3\n"
    (folder / "j.toml").write_text(HEAD + speed)
    write_table(folder, cases(60))
    command = subprocess.Popen([sys.executable, "-m", "gxr_batch", "run", "j.toml", "--quiet"], cwd=folder)
    while len(list(folder.glob("outputs/j/parts/part-*.parquet"))) < 3:
        time.sleep(0.02)
    command.send_signal(signal.SIGKILL)
    command.wait()


def retried(folder: Path) -> None:
    """Failed, held, released and retried rows; 'fail_every' is a key of the echo engine up to commit 2d832e8."""
    faults = "[echo]\nfail_every = 7\n" if "fail_every" in echo_keys() else ""
    (folder / "j.toml").write_text(
        HEAD + faults + "[privacy]\nidentifiers = 'hold'\n[model]\nmax_seq_length = 340\n[run]\nmax_failed = 'off'\n"
    )
    rows = cases(60)
    for number in (5, 17, 29):
        rows[number] = (rows[number][0], rows[number][1] + " Patient: John Example, MRN 12345678.")
    rows[7] = (rows[7][0], "")
    rows[11] = (rows[11][0], rows[11][1] + " And more of it." * 40)
    write_table(folder, rows)
    gxr(folder, "run", "j.toml", expect=3)
    gxr(folder, "run", "j.toml", "--retry", "failed", expect=3)
    gxr(folder, "run", "j.toml", "--retry", "held", "--row", rows[5][0], expect=3)


def grown(folder: Path) -> None:
    """Finished, then 100 rows more."""
    (folder / "j.toml").write_text(HEAD)
    write_table(folder, cases(40))
    gxr(folder, "run", "j.toml")
    write_table(folder, cases(140))


FORM = """[form]
sections = ["Impression", "Key findings", "Grade", "Size"]
[form.section."Key findings"]
kind = "bullets"
[form.section.Grade]
kind = "choice"
choices = ["easy", "hard"]
hidden = true
[form.section.Size]
kind = "number"
"""


def formed(folder: Path) -> None:
    """Finished with a form; a reviewer corrected one section of each of two rows; then 10 rows more."""
    (folder / "j.toml").write_text(HEAD + FORM)
    write_table(folder, cases(20))
    gxr(folder, "run", "j.toml")
    gxr(folder, "export", "outputs/j", "--format", "csv", "--to", "sheet.csv")
    with (folder / "sheet.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["gxr_review_section_impression"] = ""
    for row in rows[3:5]:
        row |= {"gxr_review_status": "approved_with_edits", "gxr_reviewer": "Ada", "gxr_reviewed_at": "2026-11-30"}
        row["gxr_review_section_impression"] = "A corrected impression."
    with (folder / "sheet.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    gxr(folder, "review", "import", "outputs/j", "sheet.csv")
    (folder / "sheet.csv").unlink()
    write_table(folder, cases(30))


def named(folder: Path) -> None:
    """Finished with a built-in form; then 10 rows more."""
    (folder / "j.toml").write_text(f"{HEAD}[form]\nname = 'teaching_case'\n")
    write_table(folder, cases(20))
    gxr(folder, "run", "j.toml")
    write_table(folder, cases(30))


TEMPLATE = """{{ findings }}{% if age or sex %}{{ " Patient: " ~ age ~ ", " ~ sex }}{% endif %}
{% if view == "lateral" %}Lateral view. {% endif %}View: {{ view }}, of {{ patient(age, sex) }}."""


def joined(folder: Path) -> None:
    """Finished with a template of its own; then 10 rows more."""
    (folder / "j.toml").write_text(f"{HEAD}[prompt]\ntemplate = 't.md.j2'\n")
    (folder / "t.md.j2").write_text(TEMPLATE)
    ages, sexes, views = ("65", "", "41"), ("w", "m", "", "female"), ("lateral", "", "PA", "AP", "")
    for count in (20, 30):
        rows = [(*case, ages[at % 3], sexes[at % 4], views[at % 5]) for at, case in enumerate(cases(count))]
        with (folder / "f.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("case_id", "findings", "age", "sex", "view"), *rows])
        if count == 20:
            gxr(folder, "run", "j.toml")


def echo_keys() -> set[str]:
    """Return the keys of [echo] that this version knows."""
    from gxr_batch.job import EchoSection

    return set(EchoSection.model_fields)


def anonymous(folder: Path, scratch: Path) -> None:
    """Take out of the texts where and by whom they were made."""
    for path in [*folder.glob("outputs/j/*.json*"), folder / "outputs/j/run.lock"]:
        text = path.read_text().replace(str(scratch), "/data").replace(socket.gethostname(), "some-host")
        path.write_text(text.replace('"by": "root"', '"by": "somebody"'))


def main(name: str) -> None:
    """Make all of a set, in a scratch folder first."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for make in (finished, unfinished, retried, grown, formed, named, joined):
            place = scratch / make.__name__
            place.mkdir()
            make(place)
            anonymous(place, scratch)
        shutil.copytree(scratch, Path(__file__).parent / name)


if __name__ == "__main__":
    main(sys.argv[1])
