"""What a run needs, from shapes alone: memory of each GPU, host memory, operations, hours. Imports no torch.

shapes.py        a model's sizes: from known_shapes.json, a local config.json, or the hub's
cards.py         memory and rates of GPUs
activations.py   what a forward pass keeps for its backward
memory.py        bytes of one GPU in each phase of a step
compute.py       operations and seconds of a step
plan.py          all of it for one recipe
advice.py        which settings make it fit, by trying them
"""
