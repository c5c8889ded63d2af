"""How long the three gradients take, with gradwire and with what else there is.

``python -m bench`` runs it. `contenders` are the ways to compute them behind
one interface, `worker` is the process of one of them, `driver` takes turns
between the workers, `statistics` and `report` make a table of what they saw.
"""
