"""Dagster assets, one file per column of the graph: a declaration, a call, and something to look at."""
