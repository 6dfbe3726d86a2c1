"""What each flag means, in a sentence for the reviewer: the one place to fill. A flag without one is shown alone."""

from __future__ import annotations

from collections.abc import Mapping

LEGEND: Mapping[str, str] = {
    "findings_truncated": "The prompt was too long for the model: the end of its longest cell was left out.",
}
