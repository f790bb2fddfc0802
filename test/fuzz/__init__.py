"""Changed copies of real messages at every decoder and handler that others can reach.

    PYTHONPATH=test python -m fuzz            # all parts, 120,000 messages and more
    PYTHONPATH=test python -m fuzz --share 0.1 router

Each part says what it found: exceptions that nobody handled, answers that blame us, what does not
work any more afterwards. ``test/router/test_fuzz.py`` runs a small share of it.
"""
