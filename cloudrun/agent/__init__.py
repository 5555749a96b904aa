"""The agent: does one attempt of a run on an instance. Zipped and sent; the client never imports it.

Standard library, Python 3.8, nothing of cloudrun but this package, `formats`, `errors`, `processes`
and `storage`. `main.main` is the story.
"""
