"""One round of training at one site: batches, loss, optimizer, devices."""
