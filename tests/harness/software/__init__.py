"""Software of others that agents keep their memory with, run in an environment of its own (`make install`).

Nothing here is imported by the tests: `python -m tests.harness.software NAME write|read ROOT` is run by that
environment's interpreter, and says as JSON what the software itself finds in its store.
"""
