"""How a program starts, is joined by others, fails in one line, and remembers what it was."""
