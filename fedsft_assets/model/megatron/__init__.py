"""Megatron-GPT archives: import, export, and the table of names between them and GPT-2's."""
