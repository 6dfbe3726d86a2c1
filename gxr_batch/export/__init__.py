"""Writes a run's results for people and other programs; reads the run only through the ledger."""

from gxr_batch.export.csv_excel import export_csv

__all__ = ["export_csv"]
