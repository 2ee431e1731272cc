"""The cluster engine: recipes on verl (Ray, FSDP2, vLLM), as a plug-in of its trainer.

    launch.py, process.py        forkrl train --trainer verl: start verl, watch it, merge its checkpoints
    settings.py, translate.py    recipe -> verl's command line, and what verl does not support
    data.py                      prompts -> Parquet, verifiers -> JSON
    plugin.py                    loaded by verl: registers the trainers and the agent loop
    options.py                   +forkrl.* on verl's command line
    trainer.py, replay.py        verl's trainers with selection, bounded dynamic sampling and records
    worker.py                    selection, loss and gradient step inside each rank
    agent_loop.py, rewards.py    sample one response to a recipe's prompt, and score it with ForkRL's verifiers
    groups.py, record.py         TransferQueue -> ForkRL's types -> the run folder, in the local engine's format

Only ``translate``, ``data`` and ``launch`` are imported outside verl's processes; they do not import verl.
"""
