"""Where raw files come from: the embedded sample, a folder, or the Hugging Face hub."""
