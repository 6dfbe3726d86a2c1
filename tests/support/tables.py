"""Helpers for reading a table in tests: survey it, convert it to input.parquet, or check that it is refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gxr_batch.errors import TableError
from gxr_batch.job import InputSection
from gxr_batch.rows.columns import FieldMap
from gxr_batch.rows.ingest import ingest
from gxr_batch.rows.survey import survey

CANARY = "kanarienvogel"


NO_FIELDS = FieldMap(templates={"t": ()}, default="t", columns={})


def look(path, **keys):
    return survey(InputSection(path=str(path), **keys))


def take(path, *, limit=None, id_column="", fields=NO_FIELDS, **keys):
    target = (Path(path).parent if "*" in str(path) else Path(path)).with_name("taken.parquet")
    taken = ingest(
        look(path, id_column=id_column, **keys), fields, target, id_column=id_column, prior=None, limit=limit
    )
    return pq.read_table(target, partitioning=None), taken


def refused(path, **keys):
    """Return the error that reading the table raises, after checking that it shows no cell and chains no error."""
    with pytest.raises(TableError) as caught:
        take(path, **keys)
    assert CANARY not in str(caught.value)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    return error
