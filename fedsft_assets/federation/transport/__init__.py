"""The tensor stream: transport of models between a server and its sites."""
