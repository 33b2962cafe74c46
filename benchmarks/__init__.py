"""Measurements and demonstrations; every number in the documents comes from a command here."""
