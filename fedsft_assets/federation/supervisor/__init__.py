"""The supervisor: the process between Dagster and a running job."""
