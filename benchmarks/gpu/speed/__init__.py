"""Stages 2, 3, 4 and 6: how fast each family is, beside diffusers, and what single switches are worth."""
