"""Hugging Face folders: checked when they come in, written when a checkpoint goes out."""
