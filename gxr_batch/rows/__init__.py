"""Files become input.parquet, input.parquet becomes rows.

`survey` looks at the files, `ingest` copies them, `table_reader` hands rows out. Everything streams. Cells are never
changed: a CSV cell is text, or null where it is empty.
"""
