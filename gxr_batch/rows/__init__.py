"""Reading tables: files are copied into input.parquet, and input.parquet is read as rows.

`survey` inspects the files, `ingest` copies them, `table_reader` yields rows. Everything streams. Cells are never
changed: a CSV cell is text, or null if it is empty.
"""
