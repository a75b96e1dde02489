"""The outside world: users, annotators, adversaries, and the cost of harm.

Importing the package registers the environment and loads nothing heavy:

>>> import gymnasium, envs
>>> env = gymnasium.make("FeedbackPoisoning/Live-v0", attack="harm_targeted", rho=0.1)
"""

from gymnasium.envs.registration import register

register("FeedbackPoisoning/Live-v0", entry_point="envs.feedback:FeedbackEnv")
