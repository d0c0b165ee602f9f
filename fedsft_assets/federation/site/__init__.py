"""Code that runs at a site."""
