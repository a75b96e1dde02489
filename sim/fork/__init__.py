"""Counterfactuals: a recorded run goes on from one of its rounds, under something else."""
