"""Checks of a row's texts before and after generation; pure, fast, without downloads."""
