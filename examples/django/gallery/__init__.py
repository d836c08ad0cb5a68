"""A Django app that sells pictures: charges once, publishes what was committed, refunds once."""
