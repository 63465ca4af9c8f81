"""Measurements: each file one subject, all run as `python -m engine.bench SUBJECT`.

Every figure comes beside what bounds it or what it is compared with, both sides measured in turns in one run; medians,
because shared machines disturb single readings; JSON with machine and versions, committed under `results/`.
"""
