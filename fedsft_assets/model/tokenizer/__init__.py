"""Tokenizers: as files, as folders, and what they make of prompts and answers."""
