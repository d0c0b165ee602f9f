"""The process between Dagster and a running job."""
