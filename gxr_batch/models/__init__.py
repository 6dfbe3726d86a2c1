"""Weights and tokenizers: from a name to loaded objects. Everything heavy is imported inside functions."""
