"""Product jobs: cutout, background, composite and refined image, each stage stored so that a job can start from it."""
