"""Simulator, benchmarks and their plots."""
