"""Code that runs in the server process of a job."""
