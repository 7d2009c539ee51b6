"""The commands of `imm-scale`: what each is told, and what it calls; table.py lists them."""
