"""Tokenizers: reading from files and folders, and encoding of prompts and answers."""
