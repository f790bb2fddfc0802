"""Live migration of a decoding request between instances.

Four parties, each the owner of one state machine (``states.py``): the *home* has the client's
stream and, while the request is away, its shadow (``home.py``); the *sender* decodes the request
and sends it (``sender.py``); the *target* receives it (``target.py``) and is then its *host*, if it
is not its home (``host.py``). ``mover.py`` is what one engine has of all of them.
"""
