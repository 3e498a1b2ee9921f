"""What a recipe will take before anything is launched: memory a rank, time, and money; and the choices that `auto` stands for.

trace.py      what one pass allocates and multiplies, read off the real model without its weights
memory.py     what a rank holds, by ZeRO stage
hardware.py   accelerators, clusters, prices
speed.py      time, communication and money
choose.py     every choice side by side, and the one to take
machines.py   this machine and Ray clusters, as they are
plan.py       a recipe, its data and its base as a plan; `auto` in a recipe made numbers
"""
