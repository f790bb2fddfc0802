"""Live migration of a decoding request between instances.

Three parties, each an owner of some states (``states.py``): the *home* keeps the client's stream
and a shadow of the request (``relay.py``); the *source* decodes it now and sends it
(``source.py``); the *target* receives and continues it (``target.py``). On the first move home
and source are the same instance.
"""
