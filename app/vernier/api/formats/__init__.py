"""JSON and raw bodies to tensors, and answers to bytes."""
