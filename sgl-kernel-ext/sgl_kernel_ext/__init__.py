"""Gather and scatter of KV pages, the only compiled part of STAR."""
