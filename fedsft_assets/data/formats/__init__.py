"""One module for each file format: from a file's rows to examples."""
