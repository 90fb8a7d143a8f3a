"""Training the small experts: data, optimiser, step, export, and the program that joins them."""
