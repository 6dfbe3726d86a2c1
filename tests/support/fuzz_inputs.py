"""Inputs for the fuzzer: tables, job files, overrides, templates, and ways to damage a run folder."""

from __future__ import annotations

import csv
import datetime as dt
import io
import random
import shutil
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 20
JOB = "name = 'j'\n[input]\npath = 'f.csv'\nid_column = 'case_id'\n[engine]\nkind = 'echo'\n"
HEADER = ["case_id", "age", "sex", "history", "findings", "comparison"]
NASTY_CELLS = [
    "", " ", "\t", "None", "nan", "a\nb", "a\r\nb", 'say "x"', "a,b", "a;b", "=1+1", "\x00", "\x1a", "\ufeff", "é", "漢字",
    "\U0001f600", "a\u2028b", "\u202e", "<start_of_turn>", "{{ 7*7 }}", "{% if", "'", '"', "x" * 5000, "%s", "\x85", "-0",
]  # fmt: skip
NASTY_BYTES = [
    b"\x00",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b'"',
    b'""',
    b",",
    b";",
    b"\n",
    b"\r",
    b"\x1a",
    b"\xc3",
    b"\xed\xa0\x80",
]


def plain_table(path: str = "f.csv", prefix: str = "C") -> None:
    """Write a valid table."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows([f"{prefix}{n}", 20 + n, "FM"[n % 2], "cough", f"opacity {n}", ""] for n in range(ROWS))


def table_job(rng: random.Random, path: str) -> str:
    """Return a job for a table about which little is known."""
    lines = ["name = 'j'", "[input]", f"path = '{path}'"]
    lines += ["id_column = 'case_id'"] * (rng.random() < 0.4)
    lines += [
        f"encoding = {rng.choice(['utf-8', 'latin-1', 'utf-16', 'utf-32', 'cp1252', 'utf-7', 'idna', 'hz'])!r}"
    ] * (rng.random() < 0.15)
    lines += [f"delimiter = {rng.choice([';', '|', 'x', ' ', 'é'])!r}"] * (rng.random() < 0.1)
    lines += ["null_values = ['None', '-']"] * (rng.random() < 0.2)
    lines += ["[prompt]", "template_column = 'sex'"] * (rng.random() < 0.2)
    lines += ["[sampling]", "samples_per_row = 2"] * (rng.random() < 0.2)
    lines += ["[run]", "max_failed = 'off'"] * (rng.random() < 0.5)
    return "\n".join([*lines, "[engine]", "kind = 'echo'", ""])


def other_commands() -> list[tuple[str, ...]]:
    """Return commands that read the run."""
    return [
        ("run", "j.toml"), ("check", "j.toml"), ("check", "j.toml", "--json"), ("status", "outputs/j"), ("status", "j.toml"),
        ("export", "outputs/j"), ("export", "outputs/j", "--partial"), ("templates", "render", "j.toml"),
        ("run", "j.toml", "--retry", "failed"), ("run", "j.toml", "--limit", "3"), ("run", "j.toml", "--fresh"),
    ]  # fmt: skip


def csv_bytes(rng: random.Random) -> tuple[bytes, int | None]:
    """Return a delimited table, and its number of rows if its structure is sound."""
    delimiter, end = rng.choice(",;\t|"), rng.choice(["\r\n", "\n", "\r"])
    cells = ["x", "opacity", "65", "F", *rng.sample(NASTY_CELLS, 6)]
    rows = [[f"C{n}", *(rng.choice(cells) for _ in HEADER[1:])] for n in range(rng.randint(0, 30))]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([HEADER, *rows])
    content = text.getvalue().encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]))
    if rng.random() < 0.25:
        return content, len(rows)
    return mutated(content, rng), None


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return bytes after a few changes: some replaced, removed, inserted, doubled, truncated."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        span = rng.choice([1, 1, 2, 8, 64])
        match rng.randrange(6):
            case 0:
                data[at : at + span] = rng.randbytes(span)
            case 1:
                del data[at : at + span]
            case 2:
                data[at:at] = rng.choice(NASTY_BYTES)
            case 3:
                data[at:at] = data[at : at + span]
            case 4:
                del data[at:]
            case _:
                if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def _columns(rng: random.Random, rows: int) -> list[pa.Array]:
    """Return columns of every type that Parquet supports, and some that only Arrow has."""
    words = [rng.choice(["x", "opacity", None, "", "é", "None"]) for _ in range(rows)]
    numbers = [rng.choice([0, 1, -5, 65, None]) for _ in range(rows)]
    times = [rng.choice([dt.datetime(2020, 1, 2, 3, 4, 5), None]) for _ in range(rows)]
    pairs = [rng.choice([{"a": "x", "b": 1}, None]) for _ in range(rows)]
    return [
        *(pa.array(words, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        *(pa.array([w and w.encode() for w in words], kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
        *(pa.array(numbers, kind) for kind in (pa.int8(), pa.int64(), pa.float32(), pa.float64(), pa.float16())),
        pa.array([n is None or n > 0 for n in numbers], pa.bool_()),
        pa.array([n and Decimal(n) for n in numbers], pa.decimal128(20, 4)),
        pa.array([n and Decimal(n) for n in numbers], pa.decimal256(60, 2)),
        *(pa.array(times, pa.timestamp(unit, zone)) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "+05:30")),
        pa.array(times, pa.date32()), pa.array(times, pa.date64()), pa.array([t and t.time() for t in times], pa.time64("ns")),
        pa.array(numbers, pa.int64()).cast(pa.duration("ns")),
        pa.array(words).dictionary_encode(), pa.array(numbers).dictionary_encode(),
        pa.array(words, pa.string_view()).cast(pa.string()).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        *(pa.array([[w] for w in words], kind) for kind in (
            pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.string(), 1), pa.list_(pa.string_view()),
            pa.list_(pa.dictionary(pa.int32(), pa.string())))),
        pa.array(pairs, pa.struct([("a", pa.string_view()), ("b", pa.int8())])),
        pa.array([[("k", w)] for w in words], pa.map_(pa.string(), pa.string())),
        pa.nulls(rows),
    ]  # fmt: skip


def parquet_bytes(rng: random.Random) -> tuple[bytes, int | None]:
    """Return a Parquet table with strange types and names, often damaged."""
    rows = rng.choice([0, 1, 7, 7, 30])
    kinds = _columns(rng, rows)
    names = [
        rng.choice([*HEADER, "findings", "", " x ", "gxr_row_id", "a.b", "é", "a\nb", "case_id"]) for _ in range(5)
    ]
    names[rng.randrange(5)] = "findings"
    columns = [rng.choice(kinds) for _ in names]
    if rng.random() < 0.04:
        names, columns = [], []
    table = pa.Table.from_arrays(columns, names=names)
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, compression=rng.choice(["none", "snappy", "zstd"]), row_group_size=rng.choice([3, 1000]),
                       use_dictionary=rng.random() < 0.5, data_page_version=rng.choice(["1.0", "2.0"]))  # fmt: skip
    except pa.ArrowNotImplementedError:  # Arrow cannot write it, so no file can hold it
        return parquet_bytes(rng)
    if rng.random() < 0.6:
        return sink.getvalue(), rows if names else None
    return mutated(sink.getvalue(), rng), None


KEYS = [
    "name", "input", "input.path", "input.id_column", "input.delimiter", "input.encoding", "input.null_values",
    "input.columns", "input.columns.findings", "prompt", "prompt.template", "prompt.template_column", "prompt.system",
    "prompt.format", "prompt.templates", "prompt.templates.own", "prompt.templates.a b", "model", "model.path", "model.dtype",
    "model.max_seq_length", "sampling", "sampling.max_new_tokens", "sampling.temperature", "sampling.top_p", "sampling.top_k",
    "sampling.repetition_penalty", "sampling.seed", "sampling.samples_per_row", "sampling.preset", "engine.slots",
    "engine.window", "engine.threads", "engine.reproducible", "engine.memory_limit", "engine.wait_for_memory", "run",
    "run.output", "run.checkpoint_seconds", "run.grace_seconds", "run.stop_by", "run.time_limit", "run.max_failed",
    "run.max_attempts", "privacy.identifiers", "export.formats", "echo", "echo.fail_every", "api", "nonsense", "run.nonsense", "echo.x.y", "", ".", "a..b", "input.path.x", "é", "x\ny",
]  # fmt: skip
NASTY_VALUES = [
    "0", "1", "-1", "3", "100", "true", "false", "''", "'x'", "\"\\u0000\"", "'a/b'", "'../up'", "'a\\b'", "'{name}'", "'{date}'", "'{x}'",
    "'{'", "'{name}/{date}'", "'*'", "'[a'", "'**'", "'f.csv'", "'j.toml'", "'.'", "'..'", "'n.j2'", "'f.csv/x'", "\"a\\u0000.j2\"",
    "'" + "n" * 300 + "'", "'" + "n" * 300 + ".j2'", "'" + "n/" * 3000 + "'", "inf", "-inf", "nan", "1e400", "1e308", "1e-320", "0.5", "9" * 25,
    "9" * 5000, "1" + "0" * 400, "[]", "[1]", "['x', 'x']", "[[]]", "{}", "{a = 1}", "{a = {b = 'c'}}", "2020-01-01", "07:30:00",
    "2020-01-01T00:00:00Z", "bare words", "[" * 2000, "{a=" * 1000, "'new'", "'auto'", "'off'", "\"\\ud800\"", "\udcff", "",
    " ", "1\nx = 2", "'06:00'", "'7h'", "'1e9h'", "'9999999999999999999999h'", "'20GiB'", "'é'", "'~'", "'~nobody/x'", "0x10", "1_0", "+1",
]  # fmt: skip


SOUND = [
    "input.id_column=sex", "input.id_column=age", "input.delimiter=','", "input.encoding=latin-1", "input.encoding=utf-16",
    "input.null_values=['cough', '']", "input.columns.findings=history", "input.columns.patient=sex", "input.path=*.csv",
    "prompt.template=educational", "prompt.template_column=sex", "prompt.system=x", "prompt.format=literal",
    "prompt.templates.F=f.csv", "model.max_seq_length=16", "model.max_seq_length=2147483647", "model.dtype=float16",
    "sampling.max_new_tokens=1", "sampling.max_new_tokens=2147483646", "sampling.temperature=0", "sampling.temperature=1e308",
    "sampling.top_k=2147483647", "sampling.seed=new", "sampling.seed=-9223372036854775808", "sampling.samples_per_row=7",
    "sampling.preset=detailed", "engine.slots=1", "engine.slots=2147483647", "engine.window=1", "engine.window=2147483647",
    "engine.threads=2147483647", "run.output=r/{name}/{date}", "run.output=a b", "run.output=./x/../y", "run.output=[a]",
    "run.output=f.csv", "run.output=f.csv/x", "run.output=.", "run.output=..", "run.output=*", "run.output={date}*",
    "run.checkpoint_seconds=1e-300", "run.checkpoint_seconds=1e308", "run.grace_seconds=1e308", "run.grace_seconds=0",
    "run.stop_by=23:59", "run.time_limit=0.0000001s", "run.time_limit=99999999999999h", "run.max_failed=1", "run.max_failed=0.01",
    "run.max_failed=off", "run.max_attempts=1000", "name=a.b", "name=0", "name=" + "n" * 100, "privacy.identifiers=off",
]  # fmt: skip


def override(rng: random.Random) -> str:
    """Return a `--set` value, usually of an accepted form."""
    if rng.random() < 0.6:
        return rng.choice(SOUND)
    text = f"{rng.choice(KEYS)}={rng.choice(NASTY_VALUES)}"
    return text if rng.random() < 0.97 else text.replace("=", "")


FAULTS: list[dict[str, object]] = [
    {"fail_every": 1}, {"fail_every": 3}, {"fail_containing": "opacity"}, {"crash_after": 1}, {"crash_after": 2147483647},
]  # fmt: skip


def faults(rng: random.Random) -> dict[str, object]:
    """Return faults of the engine, usually none."""
    return rng.choice(FAULTS) if rng.random() < 0.2 else {}


def broken_job(rng: random.Random) -> bytes:
    """Return a job file with changed keys or bytes."""
    if rng.random() < 0.4:
        full = (
            JOB
            + "[sampling]\ntemperature = 0.5\n[run]\noutput = 'outputs/{name}'\n[input.columns]\nfindings = 'history'\n"
        )
        return mutated(full.encode(), rng)
    sections: dict[str, dict[str, str]] = {
        "": {"name": "'j'"}, "input": {"path": "'f.csv'", "id_column": "'case_id'"}, "engine": {"kind": "'echo'"},
    }  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        section, _, key = rng.choice(KEYS).rpartition(".")
        value = rng.choice(NASTY_VALUES)
        sections.setdefault(section, {})[key] = value if "\udcff" not in value else "'x'"
    lines = []
    for section, keys in sections.items():
        lines += [f"[{section}]"] * bool(section) + [f"{key} = {value}" for key, value in keys.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


PIECES = [
    "{{ findings }}", "{{ history }}", "{{ nothing }}", "{{ age|int + 1 }}", "{{ patient(age, sex) }}", "{{ patient }}", "text ", "\n",
    "{% if age %}", "{% endif %}", "{% for c in findings %}", "{% endfor %}", "{{ c }}", "{{ loop.index }}", "{% set x = findings %}",
    "{{ x }}", "{% macro m(n) %}", "{% endmacro %}", "{{ m(3) }}", "{{ findings|clause }}", "{{ findings|stop }}", "{# note #}", "{{", "}}",
    "{%", "%}", "{% raw %}", "{% endraw %}", "{{ ''.__class__ }}", "{{ findings|attr('__class__') }}", "{{ self }}", "{{ self.x() }}",
    "{% include 'x' %}", "{% block a %}", "{% endblock %}", "{{ super() }}", "{{ 'x' * 1000000000 }}", "{{ 9 ** 9 ** 9 }}", "{{ 1 / 0 }}",
    "{{ findings[99] }}", "{{ findings.split() }}", "{{ findings|join(findings) }}", "{{ range(9999999)|list }}", "{{ [1] * 99999999 }}",
    "{{ findings|replace('', findings) }}", "{{ findings|indent(999999999) }}", "{{ '%999999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}",
    "{{ findings|center(999999999) }}", "{{ findings.ljust(999999999) }}", "{{ findings|tojson }}", "{{ findings|urlize }}", "{{ findings|map('x') }}",
    "{{ 1 << 99999999999 }}", "{{ findings|batch(1)|list }}", "{{ findings|sum }}", "{{ findings|sort(attribute='x') }}", "{{ findings|filesizeformat }}",
    "{% call m() %}", "{% endcall %}", "{% filter upper %}", "{% endfilter %}", "{{ dict(a=1)|xmlattr }}", "{{ findings is divisibleby 0 }}",
    "{{ 'a' 'b' }}", "{{ \u0000 }}", "{{ é }}", "{% autoescape true %}", "{% do x %}", "{{ '\\ud800' }}", "{{ findings|e }}", "{{ None }}", "{{ 0.0 }}",
    "{{ namespace(a=1).a }}", "{{ cycler('a').next() }}", "{{ joiner()() }}", "{{ lipsum(9999) }}", "{{ findings|slice(0)|list }}", "{{ 10**400 }}",
    "{{ (10**300)|float }}", "{{ [findings]|random }}", "{{ findings|wordwrap(0) }}", "{{ findings|truncate(-5) }}", "{{ findings|format(1) }}",
    "{% for a in findings recursive %}", "{{ loop(findings) }}", "{{ varargs }}", "{{ caller() }}", "{{ kwargs }}", "{{ 'x'.zfill(999999999) }}",
    "{{ 'a'.join(range(99999)|map('string')) }}", "{{ findings|list|tojson(indent=99999999) }}", "{{ ('x' * 9999 ~ findings)|wordcount }}",
    "{{ ['a' * 99999]|join('b')|replace('a', 'c' * 99999) }}", "{{ ('a' * 99999).expandtabs(999) }}", "{{ ('\\t' * 99999).expandtabs(99999) }}",
]  # fmt: skip


def template(rng: random.Random) -> str:
    """Return a template of random pieces; some of them match."""
    pieces = [rng.choice(PIECES) for _ in range(rng.randint(1, 6))]
    for opening, closing in (("{% if", "{% endif %}"), ("{% for", "{% endfor %}"), ("{% macro", "{% endmacro %}")):
        if any(piece.startswith(opening) for piece in pieces) and rng.random() < 0.8:
            pieces.append(closing)
    return "".join(pieces).encode("utf-8", "replace").decode()


def second_run(rng: random.Random) -> bool:
    """Write the job of a second run whose files may be swapped in: with another table, other settings, or no change."""
    which = rng.choice(["", "other table", "other template", "other samples"])
    if not which:
        return False
    plain_table("other.csv", "D" if which == "other table" else "C")
    job = JOB.replace("'j'", "'other'").replace("f.csv", "other.csv")
    job += "[prompt]\ntemplate = 'educational'\n" if which == "other template" else ""
    Path("other.toml").write_text(job + ("[sampling]\nsamples_per_row = 2\n" if which == "other samples" else ""))
    return True


def damage(run: Path, rng: random.Random) -> None:
    """Damage one file of a run folder."""
    files = sorted(path for path in run.rglob("*") if path.is_file())
    if not files:
        return
    path = rng.choice(files)
    content = path.read_bytes()
    match rng.randrange(9):
        case 0:
            path.write_bytes(content[: rng.randrange(len(content) + 1)])
        case 1:
            path.write_bytes(b"")
        case 2:
            path.write_bytes(
                rng.choice([rng.randbytes(200), b"{}", b"[]", b"null", b'{"format": 1}', b"PAR1PAR1", b"\xff"])
            )
        case 3:
            path.unlink()
            path.mkdir()
        case 4:
            path.unlink()
        case 5:
            path.write_bytes(mutated(content, rng))
        case 6:
            other = Path("outputs/other") / path.relative_to(run)
            if other.is_file():
                path.write_bytes(other.read_bytes())
            elif files:
                path.write_bytes(rng.choice(files).read_bytes())
        case 7:
            shutil.rmtree(run / "parts", ignore_errors=True)
            if rng.random() < 0.5:
                (run / "parts").write_text("no folder")
        case _:
            with suppress(FileExistsError):  # earlier damage may have put a file there
                (run / "parts").mkdir()
            if (run / "parts").is_file():
                return
            (run / "parts" / rng.choice(["part-00000007.parquet", "part-x.parquet", "notes.txt"])).write_bytes(content)


def follow_advice(run: Path) -> bool:
    """Rename every file that a message may ask to rename; return whether there was any."""
    renamed = False
    for path in [run / "run.json", run / "input.parquet", *sorted((run / "parts").glob("part-*.parquet"))]:
        if path.exists() and not path.name.endswith(".damaged"):
            path.rename(path.with_name(f"{path.name}.damaged"))
            renamed = True
    return renamed
