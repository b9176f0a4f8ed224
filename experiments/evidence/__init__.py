"""One page of evidence: every method at equal steps, time and memory, on every task."""
