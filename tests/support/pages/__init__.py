"""Pages that are generated, the site that they are built into, and the pictures in them."""
