"""NVFlare: the job folder, what runs at a site, what runs at the server, and where jobs run."""
