"""Connections between the processes of a federation, closed to other accounts."""
