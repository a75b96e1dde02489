"""Where speed is known: the command ``poisonloop bench`` and all that it measures.

command.py      the command            measure.py     one GRPO round, stage by stage
rounds.py       our rounds, timed      table.py       figures for people
machine.py      yardsticks             trl_*.py       the same work built from TRL
"""
