"""Kernel tuning: measured once on scratch memory, kept as data, looked up by the optimizers.

`lookup.config_for` is all that an optimizer calls. ``dragon-vm tune`` measures (`run`), ``--show`` explains
(`lookup`), and a machine without a GPU still compiles and ranks (`ranking`). See docs/tuning.md.
"""
