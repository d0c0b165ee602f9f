"""Megatron-GPT archives: import, export, and the mapping of weight names to GPT-2's."""
