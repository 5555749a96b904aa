"""Emulated services of Google Cloud, for tests. Nothing of this is shipped."""
