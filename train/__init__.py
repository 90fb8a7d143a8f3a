"""Training the small experts: data, optimiser, step, export, and the program that joins them."""

import sys

import last_words

if sys.argv[:1] == ["-m"]:  # python -m train.PROGRAM, which is about to be imported
    last_words.answer_interrupts()
