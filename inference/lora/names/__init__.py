"""Names of layers in the adapter files of each family."""
