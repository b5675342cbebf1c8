"""The broker: the process that reads devices and grants leases on them.

Everything here runs in that process alone, but for what `python -m harness gpus` shows.
"""
