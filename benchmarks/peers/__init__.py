"""The same shards through other systems, each as its users would write it.

Each module but ``models`` and ``__main__`` is one of them, a program of its own:
``python -m benchmarks.peers.NAME TASK``, with the task as JSON (`benchmarks.peers.models.Task`).
"""
