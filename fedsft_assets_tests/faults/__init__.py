"""Processes of a running job killed at random moments, and whether anything is lost."""
