"""How good is this run: which rows are drawn for reading, and what the readings say about all rows.

`draw` chooses the rows, `audit_files` stores what was drawn, `error_bounds` is the statistics, `summary` applies it to
the imported reviews. Reads a run only through the ledger; the workbooks for readers are written by `export`.
"""
