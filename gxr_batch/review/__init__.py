"""Takes reviewed sheets back in, by row id; reads and writes a run only through the ledger."""

from gxr_batch.review.importing import Imported, Refused, import_reviews

__all__ = ["Imported", "Refused", "import_reviews"]
