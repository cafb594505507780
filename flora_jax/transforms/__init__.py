"""What is kept compressed: accumulators, momentum, second moments."""
