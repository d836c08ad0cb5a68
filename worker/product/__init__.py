"""Product jobs: cut-out, background, composite, refining, each a picture that a person may correct and go on from."""
