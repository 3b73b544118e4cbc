"""The gradient: packed batches, the loss, the optimizer step. Knows nothing of search."""
