"""Benchmarks that compare this project with what it replaces; nothing in the package imports them."""
