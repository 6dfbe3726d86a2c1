"""Forms: which headings every text has, what may be under each, and how a text is taken apart into its sections.

A form comes from the job or from a file that it names. Its layout (`layout`) is such that no section can fake a
heading: a blank line separates sections, and no section has one.
"""

from gxr_batch.forms.form import PREFIX, Form, Part, form_of_run
from gxr_batch.forms.layout import (
    Content,
    composed,
    in_a_cell,
    in_layout,
    parts_of,
    recovered,
    request_of,
    sections_of,
)
from gxr_batch.forms.library import builtin_form_names, form_of, with_form_inline

__all__ = [
    "PREFIX",
    "Content",
    "Form",
    "Part",
    "builtin_form_names",
    "composed",
    "form_of",
    "form_of_run",
    "in_a_cell",
    "in_layout",
    "parts_of",
    "recovered",
    "request_of",
    "sections_of",
    "with_form_inline",
]
