"""What runs at the server of a job."""
