"""Where speed is known: the command ``poisonloop bench`` and all that it measures.

command.py   the command                     measure.py   a round, stage by stage, beside TRL's
rounds.py    our rounds, timed               trl_*.py     the same work built from TRL
machine.py   yardsticks of the machine       shapes.py    random policies of a chosen size
growth.py    time and memory along an axis   memory.py    what a round keeps, part by part
"""
