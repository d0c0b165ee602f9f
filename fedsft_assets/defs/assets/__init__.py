"""Dagster assets, one file per column of the graph: declaration, call, metadata."""
