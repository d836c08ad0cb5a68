"""`darkroom dead`: dead letters, their replay and their removal."""
