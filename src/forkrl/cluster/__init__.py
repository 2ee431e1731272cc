"""The cluster engine: recipes on verl (Ray, FSDP2, vLLM), as a plug-in of its trainer.

    settings.py      the table: recipe -> verl, and what verl cannot do
    translate.py     recipe -> verl's command line
    hydra_text.py    values as hydra reads them
    data.py          prompts -> Parquet, verifiers -> JSON
    launch.py        forkrl train --trainer verl
    plugin.py        what verl loads: registers the trainers and the agent loop
    options.py       +forkrl.* on verl's command line
    trainer.py       verl's trainers, with selection, metrics and records added
    selection.py     which tokens of a rollout batch carry gradient
    worker.py        loss and gradient step inside each rank
    replay.py        dynamic sampling with an end
    agent_loop.py    prompts exactly as the recipe words them
    rewards.py       rewards by ForkRL's verifiers
    record.py        the run folder, as the local engine writes it

Only ``translate``, ``data`` and ``launch`` are imported outside verl's processes; they do not import verl.
"""
