"""Decisions as pure functions: a snapshot goes in, placements and move orders come out."""
