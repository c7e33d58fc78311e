"""The command line: ``diffaccel list | generate | bench | demo``."""
