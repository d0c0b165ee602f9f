"""What two processes of a job share: messages, points, the journal, the report."""
