"""Readers that turn the rows of a file into examples: one module per file format."""
