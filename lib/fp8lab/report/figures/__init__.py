"""Figures of a run: each answers the question in its title, also in black and white, and writes nothing."""
