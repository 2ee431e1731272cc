"""verl 0.9.1 without a GPU: a platform and a sampler that ``register.py`` adds to verl's registries.

verl then runs its own trainer, Ray, FSDP2 on gloo and weight synchronisation, with ``platform.py`` as the accelerator
and ``rollout.py`` instead of vLLM. Ray's "GPUs" are only numbers: give ``ray.init`` as many as there are ranks.
"""
