"""Finds, compiles and lists prompt templates. Filling one with a row's cells is left to `prompts`."""

from gxr_batch.templates.library import Templates
from gxr_batch.templates.sandbox import TooMuchWork
from gxr_batch.templates.template import Template, compile_template

__all__ = ["Template", "Templates", "TooMuchWork", "compile_template"]
