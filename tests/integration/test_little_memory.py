"""Little memory, few descriptors, no standard input: one message and exit code 4, never a traceback."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from running import COMMAND, Workplace, mostly_long

from gxr_batch.errors import TableError
from gxr_batch.rows.parquet_tables import read_schema

MIB = 2**20


@pytest.fixture
def work(tmp_path):
    return Workplace(tmp_path)


def limited(work, *arguments: str, **limits: int) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))

    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=work.folder,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        preexec_fn=limit,
    )


CASES = [
    (verb, size)
    for size in (100, 300, 500, 540, 600)
    for verb in (
        ("run", "j.toml"),
        ("check", "j.toml"),
        ("status", "outputs"),
        ("report", "outputs/j"),
        ("templates", "list"),
    )
]


@pytest.mark.parametrize("case", mostly_long(CASES, every=4))
def test_a_memory_limit_ends_in_one_message(work, case):
    verb, size = case
    work.run()
    done = limited(work, *verb, RLIMIT_AS=size * MIB)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 4), done.stderr
    if done.returncode:
        assert done.stderr.count("Error: There is not enough memory.") == 1
        assert f"ulimit -v: {size} MiB" in done.stderr


def test_descriptors_that_are_used_up_end_in_one_message(work):
    done = limited(work, "run", "j.toml", RLIMIT_NOFILE=8)
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("Error: ") == 1
    assert "Traceback" not in done.stderr


def test_a_closed_standard_input_ends_a_conversation(work, demo_model_dir):
    command = [*COMMAND, "generate", "--interactive"]
    done = subprocess.run(
        command, cwd=work.folder, text=True, capture_output=True, check=False, preexec_fn=lambda: os.close(0)
    )
    assert done.returncode == 0, done.stderr


def test_a_parquet_file_with_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "f.parquet"
    length = 200 * MIB
    with path.open("wb") as file:
        file.write(b"PAR1")
        file.truncate(4 + length)
        file.seek(4 + length)
        file.write(length.to_bytes(4, "little") + b"PAR1")
    with pytest.raises(TableError, match="header has 200 MiB"):
        read_schema(path)


BOMB = """
import sys, pyarrow as pa, pyarrow.parquet as pq
words = pa.array(["finding " + "x" * 20_000_000])
table = pa.table({"case_id": pa.array(range(5000)), "findings": pa.DictionaryArray.from_arrays([0] * 5000, words)})
pq.write_table(table, sys.argv[1], compression="zstd", store_schema=False)
"""


def test_a_small_file_with_gigabytes_of_text_ends_in_one_message_under_a_limit(work):
    path = work.folder / "f.parquet"
    subprocess.run([sys.executable, "-c", BOMB, str(path)], check=True)
    assert path.stat().st_size < MIB
    work.job("[engine]\nkind = 'echo'\n", head="path = 'f.parquet'\nid_column = 'case_id'\n")
    done = limited(work, "run", "j.toml", RLIMIT_AS=1200 * MIB)
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("Error: There is not enough memory.") == 1
    assert "Traceback" not in done.stderr


NULLS = """
import sys, pyarrow as pa, pyarrow.parquet as pq
nulls = pa.nulls(20_000_000, pa.string())
pq.write_table(pa.table({"case_id": nulls, "findings": nulls}), sys.argv[1], row_group_size=len(nulls))
"""


def test_the_first_rows_of_a_row_group_with_20_million_nulls_are_read_under_a_limit(work):
    subprocess.run([sys.executable, "-c", NULLS, str(work.folder / "f.parquet")], check=True)
    work.job("[engine]\nkind = 'echo'\n", head="path = 'f.parquet'\nid_column = 'case_id'\n")
    for verb, code, words in (("check", 0, "5 rows, 0 usable, 5 not"), ("run", 3, "0 generated, 5 failed")):
        done = limited(work, verb, "j.toml", "--limit", "5", RLIMIT_AS=2048 * MIB)
        assert done.returncode == code, done.stderr
        assert words in done.stdout
