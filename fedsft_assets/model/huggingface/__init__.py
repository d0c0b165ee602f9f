"""Hugging Face folders: checks on import, and export of checkpoints."""
