"""Maths of the memory: functions from arrays to arrays; nothing here knows a rank, a path or a
configuration."""
