"""Instruction data: where it comes from, how it becomes records, and which split a record falls into."""
