"""How good is this run, and which of two is better: readings of drawn rows, and the same rows in two runs.

`draw` chooses the rows, `audit_files` stores what was drawn, `error_bounds` is the statistics, `summary` applies it to
the imported reviews. `comparison` pairs the rows of two runs, of which `row_digest` keeps a few numbers each, and
`paired_tests` is its statistics. Reads runs only through the ledger; the workbooks for readers are written by `export`.
"""
