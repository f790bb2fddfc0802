"""``star demo``: a small cluster, real prompts, live moves, and proof that they changed nothing.

Talks to the cluster as any client would, through the OpenAI API and the router's endpoints, and
so imports neither SGLang nor the router.
"""
