"""What is left of zeroth-order fine-tuning where weights are quantised."""
