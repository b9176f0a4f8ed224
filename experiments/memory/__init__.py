"""Estimates of memory beside measurements, and the tables of docs/memory.md."""
