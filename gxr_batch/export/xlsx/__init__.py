"""The workbook for reviewers."""

from gxr_batch.export.xlsx.workbook import write_xlsx

__all__ = ["write_xlsx"]
