"""The tensor stream: how models travel between a server and its sites."""
