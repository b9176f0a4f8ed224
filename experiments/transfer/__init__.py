"""What an adapter trained on a small model is worth in a large one that no gradient is taken of."""
