"""Remaining output length of running requests: the head, its engine hook, and its training."""
