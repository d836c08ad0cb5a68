"""How the demo model is made: fetch the pictures, render and caption them, train, export, look at what came of it.

`python -m examples.demo_model.recipe` runs every stage in order, in `stages.py`; each reads what the ones before it
left in the output folder, leaves its own result there, and is skipped when its result is there already.
"""
