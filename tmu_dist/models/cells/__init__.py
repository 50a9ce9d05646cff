"""Recurrent cells behind one contract (`base.RecurrentCell`); a new cell is one file."""
