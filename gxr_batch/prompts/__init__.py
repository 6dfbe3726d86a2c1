"""Prompts: finds templates, compiles them, and runs them in a sandbox; turns a row's cells into a model's turns.

Templates come from the user, cells from anywhere: neither can leave the sandbox, and no cell is read as a template.
"""

from gxr_batch.prompts.library import Templates, version_of_run
from gxr_batch.prompts.template import Template, compile_template

__all__ = ["Template", "Templates", "compile_template", "version_of_run"]
