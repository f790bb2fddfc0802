"""A discrete-event model of a disaggregated SGLang fleet, driven by the router's own policies.

Nothing here imports SGLang; what it does at a full KV pool, at admission and at a step boundary is
modelled in :mod:`instance` and compared with closed forms in the tests.
"""
