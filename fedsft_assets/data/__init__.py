"""Instruction data: sources, file formats, records and splits."""
