"""Single-device mathematics: cells, the Transferable Memory Unit, and the one loop over time.

Nothing here knows about process groups, Ray, optimisers or files.
"""
