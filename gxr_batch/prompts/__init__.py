"""Prompts: templates are found, compiled and kept in a sandbox; a row's cells become the turns that a model reads.

A template is the user's, a cell is anybody's: neither gets out of the sandbox, and no cell is read as a template.
"""

from gxr_batch.prompts.library import Templates
from gxr_batch.prompts.template import Template, compile_template

__all__ = ["Template", "Templates", "compile_template"]
