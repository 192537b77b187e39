"""Figures drawn from rows and arrays: no torch, no pyplot, no state outside the figure that is returned."""
