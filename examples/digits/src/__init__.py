"""The modules of main.py.

This file keeps any other package called `src` from being found instead.
"""
