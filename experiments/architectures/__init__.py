"""A step of HybridZOFO on every class of transformers that can be built tiny."""
