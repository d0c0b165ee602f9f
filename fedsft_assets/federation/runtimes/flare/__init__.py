"""Jobs in a running NVFlare system, through an admin's startup kit."""
