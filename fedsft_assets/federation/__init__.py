"""NVFlare: the job folder, the code of sites and server, and the runtimes."""
