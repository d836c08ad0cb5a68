"""Campaigns: hundreds of jobs while workers, broker, store and backend fail at random, judged from outside.

`make campaign` runs the long forms, `tests/campaigns/test_campaigns.py` short ones.
"""
