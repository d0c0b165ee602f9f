"""Formats shared between the processes of a job: messages, points, the journal, the report."""
