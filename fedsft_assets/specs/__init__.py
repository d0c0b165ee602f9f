"""Schemas of the user's files: typed and validated.

Every error names the file, the field, what was found and what was expected. Does not import torch, NVFlare or Dagster.
"""
