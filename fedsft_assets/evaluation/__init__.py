"""Evaluation and comparison of trained models."""
