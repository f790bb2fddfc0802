"""The seam between STAR and SGLang.

``verbs`` is what moves, orders and status ask of an engine, ``real`` how SGLang does it, and
``contract`` the table of all of SGLang that this takes, checked against its source.
"""
