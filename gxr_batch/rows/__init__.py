"""Files become input.parquet, input.parquet becomes rows. `survey` looks, `ingest` copies, `read_rows` hands rows out.

Everything streams. Cells are never changed: a CSV cell is text, or null where it is empty.
"""

from gxr_batch.rows.fields import FieldMap
from gxr_batch.rows.files import SourceFile
from gxr_batch.rows.ids import table_copy
from gxr_batch.rows.intake import Ingested, ingest
from gxr_batch.rows.reader import read_rows
from gxr_batch.rows.surveys import Survey, survey

__all__ = ["FieldMap", "Ingested", "SourceFile", "Survey", "ingest", "read_rows", "survey", "table_copy"]
