"""What 16-bit weights do to zeroth-order training: `python -m experiments.sixteen_bit`."""
