"""Measurements of the operators (`python -m benchmarks.ops`) and of training (`benchmarks.train`).

Reading order: subjects.py (what is measured), titans.py (one operator's rows), peers.py (other
people's implementations), measure.py (how a number comes about), check.py (the gate in front of
it), report.py (what is written down), ops.py and train.py (the commands).
"""
