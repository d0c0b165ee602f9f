"""Training of one round at one site: batches, loss, optimizer, devices."""
