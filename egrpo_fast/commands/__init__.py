"""What the `egrpo` command does, a file per command; `cli.py` reads the command line."""
