"""Emulated services of Google Cloud and of vast.ai, for tests. Nothing of this is shipped.

Where a fact about a service stands, its source stands beside it: `D:page` is a page of Google's Compute
Engine documentation, `discovery` the description of the API inside google-api-python-client, `measured`
what the real client libraries were seen to do, `assumed` what nobody could check so far.
"""
