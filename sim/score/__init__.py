"""Judging one defence: its contract on a tiny model, then paired arms and a card of figures."""
