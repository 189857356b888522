"""Stages that are alike, such as the layers of a stack: told, checked by a run, measured once."""
