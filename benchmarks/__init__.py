"""Measurements of the operators (`python -m benchmarks.ops`) and of training (`benchmarks.train`),
and everything that only a machine with a GPU can show (`benchmarks.gpu`, `benchmarks.status`).

Reading order: subjects.py (what is measured), titans.py and conv.py (one operator's rows each),
peers.py (other people's implementations), measure.py (how a number comes about), check.py (the gate
in front of it), session.py (who is timed against whom), report.py (what is written down beside it),
ops.py, profiling.py and train.py (the commands). For `make gpu`: gpu.py (order, limits, claims),
gpu_steps.py (its steps), on_gpu.py (what they run), sources.py (the checkout), status.py.
"""
