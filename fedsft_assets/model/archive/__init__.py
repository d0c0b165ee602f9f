"""Readers and writers of `.nemo` archives and torch checkpoints, which may come from untrusted sources."""
