"""Experiments: the loop, its configuration, its records, and what is read from them.

import sim
sim.run(sim.preset("smoke"))
"""
