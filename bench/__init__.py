"""Benchmarks of the three gradients, with gradwire and with other transports.

Run with ``python -m bench``. `contenders` implements the alternatives behind one
interface. `worker` is the process of one contender. `driver` gives the workers
turns. `report` turns the measurements into tables.
"""
