"""What we need of SGLang, written down as a table and held against SGLang's source text.

Nothing here imports SGLang: the same check reads an installed release, a folder or a wheel.
"""
