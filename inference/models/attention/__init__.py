"""Attention processors of the families, which run the projections of one input together."""
