"""Takes reviewed sheets back into a run, by row id; reads and writes a run only through the ledger.

read_sheets finds the rows of a file, parse_row makes a review of one, import_reviews stores what the run does not know.
"""
