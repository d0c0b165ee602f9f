"""Sources of raw files: the embedded sample, a folder, or the Hugging Face Hub."""
