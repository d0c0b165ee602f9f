"""Everything that imports Dagster: assets, checks, automation and resources."""
