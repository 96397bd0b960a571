"""Devices, model shapes and the timer: what tuning, the benchmarks and the doctor share."""
