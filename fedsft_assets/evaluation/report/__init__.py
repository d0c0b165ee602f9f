"""The report of a study as one HTML file, and what it is made of."""
