"""cloudrun: run main.py on a machine that is rented for exactly as long as it takes."""

__version__ = "0.1.0"
