"""Measures the HTML report: its size, the seconds and memory to make it, and the seconds until Chromium is ready.

The echo engine makes the run; then its parts get texts, times and flags like those of a real model.

The texts must not compress better than real ones. They are drawn from 12,000 made-up words and 6,000 phrases of them,
with the frequencies of English (Zipf), and have no grammar or common openings. Texts of a model repeat more: `--sample
FILE`, a Parquet file of real texts in a column gxr_text, prints the bits per character of both.

    python benchmarks/report.py                  # 10,000 rows; 200 characters of findings, 1,100 of text
    python benchmarks/report.py --rows 1000000   # figures over a million rows, a table of 10,000
    python benchmarks/report.py --keep FOLDER    # keep the run and the report there
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

JOB = """name = "report"
[input]
path = "{table}"
id_column = "case_id"
[engine]
kind = "echo"
slots = 16
[run]
output = "{output}"
checkpoint_seconds = 0.5
"""
FLAGS = ("invented_comparison", "side_flipped", "number_not_in_findings", "token_limit", "negation_flipped")
WORDS, PHRASES, PHRASE_SHARE = 12_000, 6_000, 0.6
RUN_MS = 8 * 3600 * 1000
SOUNDS = (
    "a al an ar bi ca car ce co con cu de di do e en er es ex fi ga ge hi i in la le li lo lu ma me mi "
    "mo na ne no nu o or pa pe pi plo po pul ra re ri ro sa se si so ste ta te ter ti to tra tu u va ve vi vo"
)
SYLLABLES = SOUNDS.split()


class Prose:
    """Made-up words and phrases, drawn independently with the frequencies of English (Zipf)."""

    def __init__(self, rng: random.Random) -> None:
        short = [first + second for first in SYLLABLES for second in SYLLABLES][: WORDS // 20]
        made = dict.fromkeys([*SYLLABLES[:40], *short])
        while len(made) < WORDS:
            made["".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3, 3, 4))))] = None
        self._rng, self._words = rng, list(made)
        self._weights = list(accumulate(1 / (rank + 2.7) for rank in range(WORDS)))
        self._phrases = [self._draw(rng.choice((2, 3, 4, 5, 6))) for _ in range(PHRASES)]
        self._phrase_weights = list(accumulate(1 / (rank + 2.7) for rank in range(PHRASES)))

    def _draw(self, count: int) -> list[str]:
        return self._rng.choices(self._words, cum_weights=self._weights, k=count)

    def text(self, characters: int) -> str:
        """Return sentences of about this many characters, in up to three paragraphs."""
        out, sentence, written = [], 0, 0
        while written < characters:
            phrase = self._rng.random() < PHRASE_SHARE
            piece = self._rng.choices(self._phrases, cum_weights=self._phrase_weights)[0] if phrase else self._draw(1)
            for word in piece:
                sentence += 1
                end = self._rng.random() < sentence / 90
                out.append(word.capitalize() if sentence == 1 else word)
                out[-1] += "." if end else "," * (self._rng.random() < 0.06)
                written += len(out[-1]) + 1
                sentence = 0 if end else sentence
        third = max(40, len(out) // 3 + 1)
        return "\n\n".join(" ".join(out[at : at + third]) for at in range(0, len(out), third))


def write_run(folder: Path, rows: int, characters: int, seed: int) -> Path:
    """Make a run; `seed` decides only the texts, so that two runs can be compared."""
    rng = random.Random(0)
    prose = Prose(rng)
    table, output = folder / "findings.csv", folder / "run"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case_id", "age", "sex", "history", "findings"])
        for number in range(rows):
            writer.writerow([f"TC-{number:07d}", rng.randint(1, 95), rng.choice("FM"), prose.text(30), prose.text(200)])
    job = folder / "job.toml"
    job.write_text(JOB.format(table=table, output=output))
    subprocess.run(
        [sys.executable, "-m", "gxr_batch", "run", str(job), "--quiet"], check=True, stdout=subprocess.DEVNULL
    )
    rng.seed(seed)
    began = int(time.time() * 1000) - RUN_MS
    done = 0
    for path in sorted((output / "parts").glob("part-*.parquet")):
        part = pq.read_table(path)
        pq.write_table(like_a_model(part, prose, rng, (began, done, rows), characters), path, write_page_checksum=True)
        done += part.num_rows
    return output


def like_a_model(
    part: pa.Table, prose: Prose, rng: random.Random, at: tuple[int, int, int], characters: int
) -> pa.Table:
    """Return a part with texts, times and flags like those of a real model."""
    began, done, total = at
    columns: dict[str, list[object]] = {name: part[name].to_pylist() for name in part.column_names}
    for line in range(part.num_rows):
        failed = rng.random() < 0.01
        tokens = min(256, max(20, round(rng.gauss(210, 45))))
        seconds = tokens / 210 * rng.uniform(0.9, 1.1) * 15 * RUN_MS / 1000 / total  # 15 of 16 slots are in use
        finished = began + round((done + line + rng.random()) / total * RUN_MS)
        text = None if failed else prose.text(round(characters * tokens / 205))
        cells = {
            "gxr_status": "failed" if failed else "ok",
            "gxr_text": text,
            "gxr_error": f"the prompt is too long: {rng.randint(1800, 4000)} tokens" if failed else None,
            "gxr_finish_reason": "error" if failed else "length" if tokens == 256 else "stop",
            "gxr_flags": [flag for flag in FLAGS if rng.random() < 0.04],
            "gxr_new_tokens": 0 if failed else tokens,
            "gxr_seconds_generating": None if failed else seconds,
            "gxr_seconds_share": None if failed else seconds / 15.2,
            "gxr_rows_in_batch": None if failed else rng.uniform(14, 16),
            "gxr_started_at": finished - round(seconds * 1000),
            "gxr_finished_at": finished,
        }
        for name, value in cells.items():
            columns[name][line] = value
    arrays = [pa.array(columns[field.name], field.type) for field in part.schema]
    return pa.Table.from_arrays(arrays, schema=part.schema)


def bits_a_character(texts: list[str]) -> float:
    """Return the size of the texts with gzip -9, in bits per character."""
    whole = "\n".join(texts).encode()
    return len(gzip.compress(whole, 9)) * 8 / len(whole)


def timed(*arguments: str) -> tuple[float, float]:
    """Run gxr-batch; return wall seconds and peak resident MiB of the process."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gxr_batch", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"gxr-batch {' '.join(arguments)} failed")
    return seconds, usage.ru_maxrss / 1024


def in_chromium(page: Path) -> str:
    """Return how long Chromium takes until the cases can be searched, and for a first search, as text."""
    browser_path = shutil.which("chromium")
    if not browser_path:
        return "not opened: chromium is not installed"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        opened = browser.new_page()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            opened.goto(page.absolute().as_uri())
            opened.wait_for_selector("html[data-ready]", state="attached")
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        opened.fill("#search", "pulcar")
        opened.wait_for_selector("#rows mark")
        search = time.perf_counter() - began
        heap = opened.evaluate("performance.memory.usedJSHeapSize") / 2**20
        browser.close()
    return (
        f"interactive in {min(times):.2f} s (best of 3), first search {search:.2f} s, {heap:.0f} MiB of script memory"
    )


@contextlib.contextmanager
def place(keep: Path | None) -> Iterator[Path]:
    """Yield a working folder: `keep`, or a temporary one."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="gxr-batch-report-") as scratch:
        yield Path(scratch)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--characters", type=int, default=1_100, help="of a generated text")
    parser.add_argument("--against", action="store_true", help="compare with a second run with different texts")
    parser.add_argument("--sample", type=Path, help="Parquet with real texts in gxr_text, to compare the compression")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with place(options.keep) as folder:
        (folder / "a").mkdir(exist_ok=True)
        run = write_run(folder / "a", options.rows, options.characters, seed=1)
        table = pq.read_table(run / "parts", columns=["gxr_text"])
        texts = [text for text in table["gxr_text"].to_pylist()[:10_000] if text]
        print(f"{options.rows:,} rows, {sum(map(len, texts)) / len(texts):,.0f} characters per text")
        print(f"gzip -9 of these texts: {bits_a_character(texts[:2000]):.2f} bits per character")
        if options.sample:
            real = [text for text in pq.read_table(options.sample)["gxr_text"].to_pylist() if text]
            print(f"gzip -9 of {len(real):,} real texts: {bits_a_character(real):.2f} bits per character")
        more: list[str] = []
        if options.against:
            (folder / "b").mkdir(exist_ok=True)
            more = ["--against", str(write_run(folder / "b", options.rows, options.characters, seed=2))]
        seconds, memory = timed("report", str(run), *more)
        page = run / "report.html"
        print(f"{page.stat().st_size:,} bytes, made in {seconds:.1f} s, at most {memory:,.0f} MiB")
        print(in_chromium(page))


if __name__ == "__main__":
    main()
