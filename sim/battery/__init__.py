"""Every defence against every learner under full attack: one table, one picture.

``arms`` says which runs, ``cost`` times a round against the same round without a defence, ``rows``
reads the runs, ``table`` and ``plot`` show them, ``command`` is ``poisonloop battery``.
"""
