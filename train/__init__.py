"""Training the small experts: data, optimiser, step, export, and the program that joins them."""

import proxy_jax as proxy_jax  # from here on Ctrl-C is answered in one word
