"""The supervisor: broker in, outcome out. It never imports torch."""
