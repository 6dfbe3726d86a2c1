"""Imports reviewed sheets into a run, by row id. Reads and writes a run only through the ledger.

read_sheets finds the rows of a file, match_rows the case of a row whose id was changed, parse_row converts a row into a
review, import_reviews stores new reviews.
"""
