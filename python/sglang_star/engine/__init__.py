"""The seam between STAR and SGLang: what moves, orders and status ask of an engine, and how."""
