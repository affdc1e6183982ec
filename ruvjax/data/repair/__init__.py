"""Code repair: Python functions, faults put into them, the grids a model sees, and checks of what it answers."""
